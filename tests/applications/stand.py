"""The stand: two FPM pools, Slackwater before them, a client of plain requests, Chromium, and the checks of one round."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import traceback
import urllib.parse
import zlib
from collections import Counter
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

HERE = Path(__file__).parent
COLOURS = ("blue", "green")


class Wrong(Exception):
    """What a check has found."""


def same(actual, wanted, what):
    if actual != wanted:
        raise Wrong(f"{what}: {actual!r}, not {wanted!r}")


def holds(condition, what):
    if not condition:
        raise Wrong(what)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(condition, what, seconds=30, pause=0.05):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(pause)
    raise Wrong(f"not within {seconds} s: {what}")


def picture(width, height):
    """A PNG with some colours, so that thumbnails have something to show."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"".join(bytes((x * 255 // width, y * 255 // height, (x ^ y) & 255)) for x in range(width)) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def size_of(png):
    return struct.unpack(">II", png[16:24])


# Code ----------------------------------------------------------------------------------------------------------------------------------------


def copy_code(unpacked, source, target, without=()):
    """A folder of the unpacked packages with its links followed, absolute ones inside of `unpacked`; what leads nowhere is left out."""
    for item in sorted((unpacked / source).iterdir()):
        if item.name in without:
            continue
        place = item
        while place.is_symlink():
            link = os.readlink(place)
            place = unpacked / link[1:] if link.startswith("/") else Path(os.path.normpath(place.parent / link))
        if place.is_dir():
            (target / item.name).mkdir(parents=True, exist_ok=True)
            copy_code(unpacked, place.relative_to(unpacked), target / item.name)
        elif place.is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(place, target / item.name)


def replace_in(folder, pattern, old, new):
    for path in folder.rglob(pattern):
        text = path.read_bytes()
        if old.encode() in text:
            path.write_bytes(text.replace(old.encode(), new.encode()))


# Processes -----------------------------------------------------------------------------------------------------------------------------------


class Fpm:
    def __init__(self, colour, folder, listen):
        configuration = folder / f"fpm-{colour}.conf"
        settings = {
            "session.save_path": folder / "sessions",
            "upload_tmp_dir": folder / "tmp",
            "sys_temp_dir": folder / "tmp",
            "error_log": folder / "php.log",
            "log_errors": 1,
            "display_errors": 0,
            "upload_max_filesize": "16M",
            "post_max_size": "20M",
            "sendmail_path": "/bin/true",
            "opcache.revalidate_freq": 0,
        }
        user = "user = root\ngroup = root\n" if os.geteuid() == 0 else ""
        configuration.write_text(
            f"[global]\ndaemonize = no\nerror_log = {folder}/fpm-{colour}.log\nprocess_control_timeout = 10\n\n"
            f"[{colour}]\nlisten = {listen}\n{user}pm = static\npm.max_children = 4\npm.status_path = /fpm-status\nping.path = /fpm-ping\n"
            "catch_workers_output = yes\n" + "".join(f"php_admin_value[{name}] = {value}\n" for name, value in settings.items())
        )
        self.process = subprocess.Popen(["/usr/sbin/php-fpm8.2", "--allow-to-run-as-root", "--fpm-config", configuration], stderr=subprocess.DEVNULL)

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


class Slackwater:
    def __init__(self, binary, folder, configuration, port, ops):
        self.binary, self.configuration, self.port, self.ops = binary, configuration, port, ops
        self.log = open(folder / "slackwater.log", "w")
        self.process = subprocess.Popen([binary, "serve", "--config", configuration], stdout=self.log, stderr=self.log)
        until(lambda: self.process.poll() is None and self.ready(), f"Slackwater is ready, see {folder}/slackwater.log")

    def ready(self):
        try:
            return Client(self.ops).get("/readyz").status == 200
        except OSError:
            return False

    def command(self, *words):
        run = subprocess.run([self.binary, *words, "--config", self.configuration], capture_output=True, text=True, timeout=120)
        same(run.returncode, 0, f"exit code of {words}, which said {run.stdout}{run.stderr}")
        return run.stdout

    def metrics(self, name):
        """`{labels: value}`, the labels as a dictionary's items, sorted."""
        text = Client(self.ops).get("/metrics").text
        samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.M)
        return {tuple(sorted(re.findall(r'(\w+)="([^"]*)"', labels))): float(value) for labels, value in samples}

    def own_errors(self):
        return {dict(labels)["cause"]: int(value) for labels, value in self.metrics("slackwater_errors_total").items() if value}

    def stop(self):
        # Drains, without the time that a load balancer would need.
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(40)
        self.log.close()
        same(code, 0, "Slackwater's exit code")


class Swaps(threading.Thread):
    """Turns to green and back until it is told to stop; ends on blue."""

    def __init__(self, slackwater, pause=0.5):
        super().__init__(daemon=True)
        self.slackwater, self.pause, self.end = slackwater, pause, threading.Event()
        self.receipts, self.error = [], None

    def run(self):
        try:
            while not self.end.is_set():
                for colour in ("green", "blue"):
                    said = self.slackwater.command("swap", "php", colour, "--wait", "--timeout", "60s")
                    self.receipts.append(json.loads(said[said.index("{") :]))
                    self.end.wait(self.pause)
        except Exception as error:
            self.error = error


# Requests ------------------------------------------------------------------------------------------------------------------------------------


class Answer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def text(self):
        return self.body.decode("utf-8", "replace")

    @property
    def location(self):
        return self.headers.get("Location", "")

    def field(self, name):
        """The value of a hidden field of a form."""
        for tag in re.findall(r"<input[^>]*>", self.text):
            if re.search(rf"""\bname=["']{re.escape(name)}["']""", tag):
                return re.search(r"""\bvalue=["']([^"']*)["']""", tag)[1].replace("&amp;", "&")
        raise Wrong(f"no field {name} in the page: {self.status} {self.text[:300]}")


class Client:
    """Sends a target as it is written, follows nothing, keeps cookies."""

    def __init__(self, port, host=None):
        self.port, self.host, self.cookies = port, host or f"127.0.0.1:{port}", {}

    def request(self, method, target, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", self.host)
            if self.cookies:
                connection.putheader("Cookie", "; ".join(f"{name}={value}" for name, value in self.cookies.items()))
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = Answer(connection.getresponse())
        finally:
            connection.close()
        for cookie in answer.headers.get_all("Set-Cookie", []):
            name, value = cookie.split(";")[0].split("=", 1)
            self.cookies[name] = value
        return answer

    def get(self, target, headers=None):
        return self.request("GET", target, headers=headers)

    def post(self, target, fields, headers=None):
        body = urllib.parse.urlencode(fields).encode()
        return self.request("POST", target, body, {"Content-Type": "application/x-www-form-urlencoded", **(headers or {})})

    def upload(self, target, fields, files, headers=None):
        """`files`: {field: (name, bytes)}."""
        mark = "slackwater-applications"
        parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
        for field, (name, data) in files.items():
            head = f'--{mark}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
            parts.append(head.encode() + data + b"\r\n")
        body = b"".join(parts) + f"--{mark}--\r\n".encode()
        return self.request("POST", target, body, {"Content-Type": f"multipart/form-data; boundary={mark}", **(headers or {})})


# The browser ---------------------------------------------------------------------------------------------------------------------------------


class Browser:
    """Chromium that reaches nothing but this site, and remembers what went wrong on the pages it has seen."""

    def __init__(self, folder, base):
        self.base, self.protocols = base, {}
        self.requests, self.elsewhere, self.failed, self.console = 0, set(), [], []
        self.urls = {}
        self.expected, self.as_expected = None, 0
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for argument in (
            "--headless=new",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--lang=en-US",
            "--window-size=1300,1400",
            f"--user-data-dir={folder}/chromium",
            # Nobody has signed the certificate of a round by https.
            "--ignore-certificate-errors",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(argument)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)
        self.driver.set_page_load_timeout(90)
        self.driver.set_script_timeout(60)

    def open(self, path):
        self.driver.get(path if path.startswith("http") else self.base + path)
        self.collect()

    def find(self, css, seconds=30):
        return WebDriverWait(self.driver, seconds).until(lambda driver: driver.find_element("css selector", css), f"no {css} in {self.where()}")

    def click(self, css):
        """Waits until it is there and can be clicked."""

        def attempt(driver):
            try:
                driver.find_element("css selector", css).click()
                return True
            except Exception:
                return False

        WebDriverWait(self.driver, 30).until(attempt, f"{css} cannot be clicked in {self.where()}")
        self.collect()

    def type(self, css, text):
        field = self.find(css)
        field.clear()
        field.send_keys(text)

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def wait(self, condition, what, seconds=30):
        value = WebDriverWait(self.driver, seconds, ignored_exceptions=[Exception]).until(lambda _: condition(), f"{what}, in {self.where()}")
        self.collect()
        return value

    def where(self):
        return self.driver.current_url

    def collect(self):
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            event = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                self.urls[event["requestId"]] = event["request"]["url"]
            elif message["method"] == "Network.responseReceived":
                self.seen(event["response"]["url"], event["response"]["status"])
                if event["response"]["url"].startswith(self.base) and not event["response"].get("fromDiskCache"):
                    protocol = event["response"].get("protocol", "?")
                    self.protocols[protocol] = self.protocols.get(protocol, 0) + 1
            elif message["method"] == "Network.loadingFailed" and not event.get("canceled"):
                self.seen(self.urls.get(event["requestId"], "?"), event["errorText"])
        for entry in self.driver.get_log("browser"):
            known = [*self.elsewhere, *filter(None, [self.expected])]
            if entry["level"] == "SEVERE" and not any(word in entry["message"] for word in known):
                self.console.append(entry["message"])

    def seen(self, url, outcome):
        if url.startswith(self.base):
            self.requests += 1
            if self.expected and self.expected in url and outcome == 404:
                self.as_expected += 1
            elif not isinstance(outcome, int) or outcome >= 400:
                self.failed.append(f"{outcome} {url.removeprefix(self.base)}")
        elif url.startswith("http"):
            self.elsewhere.add(urllib.parse.urlsplit(url).netloc)

    def stop(self):
        self.driver.quit()


# The round -----------------------------------------------------------------------------------------------------------------------------------


class Check:
    def __init__(self, name):
        self.name, self.passed, self.figures, self.seconds = name, True, "", 0.0


class Round:
    """One application: its folder, its processes, its checks."""

    def __init__(self, name, state, binary):
        self.name, self.folder, self.unpacked, self.downloads, self.binary = name, state / name, state / "unpacked", state / "downloads", binary
        self.checks, self.denials, self.browser, self.stack = [], 0, None, contextlib.ExitStack()
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in ("shared", "sessions", "tmp"):
            (self.folder / folder).mkdir(parents=True)
        self.shared = self.folder / "shared"
        self.port = free_port()
        # As its clients see it, and its browser.
        self.base = self.seen_at = f"http://127.0.0.1:{self.port}"

    def version(self, package):
        return (self.unpacked / f".{package}").read_text().strip()

    @contextlib.contextmanager
    def check(self, name):
        """A failure is written down, and the round goes on."""
        check, start = Check(name), time.monotonic()
        try:
            yield check
        except Exception as error:
            check.passed = False
            check.figures = " ".join(str(error).split("Stacktrace:")[0].split())[:600]
            if self.browser and self.browser.driver.service.is_connectable():
                self.browser.driver.save_screenshot(str(self.folder / f"failed-{len(self.checks)}.png"))
            if not isinstance(error, Wrong):
                (self.folder / "traceback.log").open("a").write(f"{name}\n{traceback.format_exc()}\n")
        check.seconds = time.monotonic() - start
        self.checks.append(check)
        print(f"  {name}: {'passed' if check.passed else 'FAILED'}, {check.seconds:.1f} s; {check.figures}", flush=True)

    def start(self):
        """Both pools and Slackwater; `blue` and `green` below the round's folder are there by now."""
        ops, fpm = free_port(), free_port()
        values = {"STATE": self.folder, "HTTP": self.port, "OPS": ops, "FPM": fpm}
        text = (HERE / f"{self.name}.toml").read_text()
        if "{{HTTPS}}" in text:
            values["HTTPS"] = free_port()
            self.seen_at = f"https://127.0.0.1:{values['HTTPS']}"
            made = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "90", "-subj", "/CN=127.0.0.1"]
            files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", self.folder / "tls.key", "-out", self.folder / "tls.crt"]
            subprocess.run(["openssl", "req", *made, *files], check=True, capture_output=True)
        for name, value in values.items():
            text = text.replace("{{" + name + "}}", str(value))
        self.configuration = self.folder / "slackwater.toml"
        self.configuration.write_text(text)
        for colour, listen in zip(COLOURS, (self.folder / "blue.sock", f"127.0.0.1:{fpm}")):
            self.stack.callback(Fpm(colour, self.folder, listen).stop)
        until(lambda: (self.folder / "blue.sock").exists(), "FPM listens")
        self.slackwater = Slackwater(self.binary, self.folder, self.configuration, self.port, ops)
        self.stack.callback(self.slackwater.stop)
        self.client = Client(self.port)

    def browse(self):
        with self.check("no client counts as gone before its answer ended"):
            # Until now every answer has been read to its end.
            same(self.slackwater.own_errors().get("client_left", 0), 0, "slackwater_errors_total of client_left")
        self.browser = Browser(self.folder, self.seen_at)
        self.stack.callback(self.browser.stop)
        return self.browser

    def denied(self, *targets):
        """Each is Slackwater's own 404, and shows no code."""
        for target in targets:
            answer = Client(self.port).get(target)
            self.denials += 1
            same(answer.status, 404, f"status of {target}")
            holds(b"<?php" not in answer.body and b"$" not in answer.body, f"{target} shows something: {answer.text[:200]}")
        return f"{len(targets)} paths"

    def redirects(self, target, wanted, status=None):
        """A redirect to this host and port, or one without a host."""
        answer = self.client.get(target)
        holds(answer.status in ([status] if status else [301, 302, 303]), f"{target} is no redirect but {answer.status}: {answer.text[:200]}")
        same(answer.location.removeprefix(self.base), wanted, f"Location of {target}")

    def requests_by(self, label):
        count = Counter()
        for labels, value in self.slackwater.metrics("slackwater_requests_total").items():
            count[dict(labels).get(label, "")] += int(value)
        return count

    @contextlib.contextmanager
    def swapping(self):
        """The traffic turns to green and back all the time while the block runs; that nothing failed is a check of its own."""
        swaps = Swaps(self.slackwater)
        swaps.start()
        try:
            yield
        finally:
            swaps.end.set()
            swaps.join()
        with self.check("swaps while the browser is at work") as check:
            if swaps.error:
                raise swaps.error
            total = {key: sum(receipt[key] for receipt in swaps.receipts) for key in ("in_flight", "completed", "failed", "retried", "client_left")}
            cut = sum(len(receipt["cut"]) for receipt in swaps.receipts)
            holds(len(swaps.receipts) >= 2, "there and back has not been done")
            same((total["failed"], cut), (0, 0), "failed and cut requests of the receipts")
            sets = self.requests_by("set")
            holds(all(sets[colour] for colour in COLOURS), f"one set has answered nothing: {sets}")
            check.figures = (
                f"{len(swaps.receipts)} swaps, 0 failed, 0 cut, {total['in_flight']} in flight at a turn, {total['retried']} retried; "
                f"answers by blue {sets['blue']}, by green {sets['green']}"
            )

    def closing_checks(self, known=None):
        """What holds for every application when it has been used. `known`: {cause: why there are such errors}."""
        with self.check("no console errors, no failed subresources") as check:
            self.browser.collect()
            check.figures = f"{self.browser.requests} requests of the browser"
            if self.browser.elsewhere:
                check.figures += f"; not counted, there is no way to them: {', '.join(sorted(self.browser.elsewhere))}"
            problems = self.browser.failed + self.browser.console
            holds(not problems, f"{len(problems)} problems: {'; '.join(problems[:8])}")
        with self.check("no error of Slackwater's own but what the denials ask for") as check:
            errors = self.slackwater.own_errors()
            # The browser leaves requests behind when it goes on to another page: that is its own doing.
            left = errors.pop("client_left", 0)
            figures = [f"{self.denials} not_found, as asked for", f"{left} client_left"]
            figures += [f"{errors.pop(cause)} {cause}: {why}" for cause, why in (known or {}).items() if cause in errors]
            same(errors, {"not_found": self.denials}, "slackwater_errors_total")
            check.figures = "; ".join(figures)
        with self.check("no answer of 500 and above") as check:
            codes = self.requests_by("code")
            check.figures = f"{sum(codes.values())} requests: {', '.join(f'{count} of {code}' for code, count in sorted(codes.items()))}"
            holds(not any(code.startswith("5") for code in codes), check.figures)
        with self.check("what PHP logged") as check:
            log = self.folder / "php.log"
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            fatal = [line for line in lines if "PHP Fatal" in line or "PHP Parse" in line]
            check.figures = f"{len(lines)} lines, {len(fatal)} fatal"
            holds(not fatal, f"{check.figures}: {fatal[:1]}")

    def close(self):
        self.stack.close()
