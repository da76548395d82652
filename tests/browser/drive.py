#!/usr/bin/python3
"""One Chromium, told by lines of JSON on stdin what to do; one line of JSON for each. Nothing but loopback can be reached.

{"open": URL}   {"look": [WIDTH, "dark"|"light"]}   {"until": JAVASCRIPT}   {"ask": JAVASCRIPT}   {"key": "TAB"}   {"shot": FILE}   {"console": true}
"""
import base64
import json
import pathlib
import sys
import tempfile
import time

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

PATIENCE = 30


def chromium(folder):
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--lang=en-US",
                     "--window-size=1280,900", f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)


def do(driver, what, how):
    ask = lambda expression: driver.execute_script(f"return ({expression})")
    if what == "open":
        return driver.get(how)
    if what == "look":
        width, scheme = how
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 600, "deviceScaleFactor": 1, "mobile": False})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        return None
    if what == "until":
        end = time.time() + PATIENCE
        while not (answer := ask(how)):
            if time.time() > end:
                raise TimeoutError(f"not in {PATIENCE} s: {how}; the page says: {ask('document.body.innerText')[:2000]}")
            time.sleep(0.05)
        return answer
    if what == "ask":
        return ask(how)
    if what == "key":
        return driver.switch_to.active_element.send_keys(getattr(Keys, how))
    if what == "shot":
        width, height = ask("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})["data"]
        return pathlib.Path(how).write_bytes(base64.b64decode(data))
    if what == "console":
        return [entry["message"] for entry in driver.get_log("browser")]
    raise ValueError(what)


with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    driver = chromium(folder)
    try:
        for line in sys.stdin:
            ((what, how),) = json.loads(line).items()
            try:
                answer = {"ok": do(driver, what, how)}
            except Exception as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    finally:
        driver.quit()
