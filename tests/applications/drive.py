"""Runs the rounds that have not passed yet and writes the result. See `run`."""

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path

from stand import Round

APPLICATIONS = ("dokuwiki", "wordpress", "mediawiki")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[0]


def run(name, state, binary):
    print(name, flush=True)
    start = time.monotonic()
    round_ = Round(name, state, binary)
    try:
        title = importlib.import_module(name).drive(round_)
    except Exception as error:
        # Something outside of a check: the round cannot go on.
        traceback.print_exc()
        title = name
        with round_.check("the round"):
            raise error
    except BaseException:
        round_.close()
        raise
    with round_.check("everything ends when it is told to"):
        round_.close()
    checks = [vars(check) for check in round_.checks]
    return {"title": title, "seconds": time.monotonic() - start, "checks": checks, "passed": all(check["passed"] for check in checks)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("names", nargs="+", choices=APPLICATIONS)
    given = parser.parse_args()
    # So that what has been started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    binary = Path(os.environ["SLACKWATER_BIN"]).resolve()
    state = given.state.resolve()

    lines, passed, failed = [], 0, 0
    for name in APPLICATIONS:
        file = state / f"{name}.json"
        result = json.loads(file.read_text()) if file.exists() else None
        if name in given.names and not (result and result["passed"]):
            result = run(name, state, binary)
            file.write_text(json.dumps(result))
        if not result:
            continue
        lines += [f"## {result['title']}, {result['seconds']:.0f} s", ""]
        for check in result["checks"]:
            passed, failed = passed + check["passed"], failed + (not check["passed"])
            outcome = "passed" if check["passed"] else "FAILED"
            lines.append(f"- {check['name']}: {outcome}{check['figures'] and '; '}{check['figures']}")
        lines.append("")

    commit = output("git", "describe", "--always", "--dirty")
    head = [
        f"# applications, {datetime.now(timezone.utc):%FT%TZ}",
        "",
        f"`tests/long applications` on {os.cpu_count()} cores, {platform.system()} {platform.release()}, {commit}; {output(binary, '--version')}, "
        f"{output('/usr/sbin/php-fpm8.2', '-v').split(' (')[0]}, {output('/usr/bin/chromium', '--version').split(' built')[0].strip()}. "
        "Applications of Debian, each in a blue and a green copy with four FPM workers, one on a unix socket, one on TCP.",
        "",
    ]
    given.result.write_text("\n".join(head + lines + [f"{passed} passed, {failed} failed", ""]))
    print(f"{given.result}: {passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
