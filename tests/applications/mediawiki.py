"""MediaWiki on SQLite: titles that are hard on a web server, load.php, api.php, rest.php, thumbnails on demand, the visual editor."""

import hashlib
import json
import re
import shutil
import subprocess
from urllib.parse import quote, urlencode

from stand import COLOURS, Client, copy_code, holds, picture, same, size_of, until

USER, PASSWORD = "Ada", "correct horse battery"
# Each with the way it stands in a URL of MediaWiki's own.
TITLES = {
    "What?": "What%3F",
    "A//B": "A//B",
    "Ä": "%C3%84",
    "C++ & 100%": "C%2B%2B_%26_100%25",
    'Половодье/Ебб, "q"': "%D0%9F%D0%BE%D0%BB%D0%BE%D0%B2%D0%BE%D0%B4%D1%8C%D0%B5/%D0%95%D0%B1%D0%B1,_%22q%22",
    "X.php": "X.php",
}

DENIED = """
/cache/ /cache/l10n.json /includes/ /includes/AutoLoader.php /includes/libs/README /languages/data/Names.php /languages/i18n/en.json
/maintenance/ /maintenance/update.php /maintenance/tables.json /%6daintenance/tables.json /mw-config/ /mw-config/index.php /mw-config/config.js
/vendor/autoload.php /vendor/composer.json /autoload.php /composer.json /LocalSettings.php /LocalSettings.php/x /images/../LocalSettings.php
/images/evil.php /images/evil.php/x.png /images/deleted/x.png /resources/Resources.php /skins/Vector/includes/Hooks.php
/extensions/WikiEditor/extension.json.php /extensions/VisualEditor/includes/VisualEditorHooks.php /.htaccess
""".split()

SETTINGS = """
$wgArticlePath = '/wiki/$1';
$wgUsePathInfo = true;
$wgEnableUploads = true;
$wgUseImageMagick = false;
$wgGenerateThumbnailOnParse = false;
$wgCacheDirectory = '{shared}/cache';
# Not in the memory of one pool: sessions must live through a swap.
$wgMainCacheType = CACHE_DB;
$wgFavicon = '/resources/assets/mediawiki.png';
$wgVerifyMimeType = true;
$wgVisualEditorShowBetaWelcome = false;
wfLoadExtensions( [ 'WikiEditor', 'VisualEditor', 'ParserFunctions', 'MultimediaViewer' ] );
"""


def install_code(r):
    for folder in ("data", "cache", "images"):
        (r.shared / folder).mkdir()
    for colour in COLOURS:
        code = r.folder / colour
        # Where Debian's links in extensions/ lead.
        copy_code(r.unpacked, "usr/share/mediawiki", code, without=("extensions-core",))
        (code / "cache").mkdir(exist_ok=True)
        (code / "cache/l10n.json").write_text("$secret")
        shutil.rmtree(code / "images", ignore_errors=True)
        (code / "images").symlink_to(r.shared / "images")
        # Debian's installer writes to /etc.
        shutil.rmtree(code / "mw-config/overrides")


def set_up(r):
    blue = r.folder / "blue"
    words = [
        "--dbtype",
        "sqlite",
        "--dbpath",
        r.shared / "data",
        "--dbname",
        "wiki",
        "--server",
        r.base,
        "--scriptpath",
        "",
        "--pass",
        PASSWORD,
        "--lang",
        "en",
    ]
    run = subprocess.run(
        ["php8.2", blue / "maintenance/install.php", *words, "--skins", "Vector", "Tide", USER], capture_output=True, text=True, timeout=300
    )
    holds(run.returncode == 0 and (blue / "LocalSettings.php").exists(), run.stdout[-1000:] + run.stderr[-1000:])
    settings = (blue / "LocalSettings.php").read_text() + SETTINGS.replace("{shared}", str(r.shared))
    for colour in COLOURS:
        (r.folder / colour / "LocalSettings.php").write_text(settings)


class Api:
    def __init__(self, client):
        self.client = client

    def __call__(self, action, **fields):
        return json.loads(self.client.post("/api.php", {"action": action, "format": "json", "formatversion": "2", **fields}).text)

    def token(self, kind):
        return self("query", meta="tokens", type=kind)["query"]["tokens"][f"{kind}token"]

    def edit(self, title, text):
        same(self("edit", title=title, text=text, token=self.token("csrf")).get("edit", {}).get("result"), "Success", f"edit of {title}")


def file_path(name):
    """Where MediaWiki keeps a file."""
    mark = hashlib.md5(name.encode()).hexdigest()
    return f"{mark[0]}/{mark[:2]}/{quote(name)}"


def drive(r):
    install_code(r)
    with r.check("maintenance/install.php on SQLite"):
        set_up(r)
    r.start()
    anonymous, client = r.client, Client(r.port)
    api = Api(client)

    with r.check("login"):
        answer = api("clientlogin", username=USER, password=PASSWORD, loginreturnurl=r.base, logintoken=api.token("login"))
        same(answer.get("clientlogin", {}).get("status"), "PASS", f"clientlogin {answer}")
        same(api("query", meta="userinfo")["query"]["userinfo"]["name"], USER, "who is logged in")
    with r.check("redirects keep the port"):
        r.redirects("/", "/wiki/Main_Page", 301)
        r.redirects("/index.php", "/wiki/Main_Page", 301)
        r.redirects("/wiki/main_Page", "/wiki/Main_Page", 301)
    with r.check("titles with ?, //, &, %, UTF-8 and .php: edited and read") as check:
        for number, (title, name) in enumerate(TITLES.items()):
            api.edit(title, f"text number {number} of it")
            for place in (f"/wiki/{name}", f"/index.php/{name}", f"/index.php?{urlencode({'title': title.replace(' ', '_')})}"):
                page = anonymous.get(place)
                holds(
                    page.status == 200 and f"text number {number} of it" in page.text, f"{place}: {page.status}, {re.search('<title>.*', page.text)}"
                )
            raw = anonymous.get(f"/wiki/{name}?action=raw")
            same((raw.status, raw.text), (200, f"text number {number} of it"), f"raw text of {title}")
        check.figures = f"{len(TITLES)} titles, each as /wiki/, index.php/, ?title= and raw"
    with r.check("a page that is not there is MediaWiki's 404"):
        page = anonymous.get("/wiki/Not_here")
        holds(page.status == 404 and "There is currently no text in this page" in page.text, f"{page.status}")
    with r.check("load.php: startup, styles, 304") as check:
        page = anonymous.get("/wiki/Main_Page").text
        sources = [source.replace("&amp;", "&") for source in re.findall(r'(?:href|src)="(/load\.php[^"]*)"', page)]
        holds(len(sources) >= 2, f"only {sources}")
        for source in sources:
            # The second answer has the ETag that stays: the first has found out what the module depends on.
            answer = anonymous.get(source) and anonymous.get(source)
            holds(answer.status == 200 and len(answer.body) > 300, f"{source}: {answer.status}, {len(answer.body)} bytes")
            same(anonymous.get(source, {"If-None-Match": answer.headers["ETag"]}).status, 304, f"{source} again")
        check.figures = f"{len(sources)} of them"
    with r.check("api.php and rest.php"):
        same(
            json.loads(anonymous.get("/api.php?action=query&titles=What%3F&format=json&formatversion=2").text)["query"]["pages"][0]["title"],
            "What?",
            "title",
        )
        for title in TITLES:
            answer = anonymous.get(f"/rest.php/v1/page/{quote(title.replace(' ', '_'), safe='')}")
            holds(answer.status == 200 and json.loads(answer.text)["title"] == title, f"rest.php of {title}: {answer.status} {answer.text[:200]}")
        answer = anonymous.get("/rest.php/v1/search/title?q=A&limit=3")
        holds("A//B" in [page["title"] for page in json.loads(answer.text)["pages"]], answer.text[:300])
        body = json.dumps({"source": "by REST", "title": "Rest", "comment": "", "token": api.token("csrf")}).encode()
        same(client.request("POST", "/rest.php/v1/page", body, {"Content-Type": "application/json"}).status, 201, "status of a page made by REST")
        same(anonymous.get("/rest.php/v1/page/Not_here").status, 404, "status of a page that is not there")
        holds("<OpenSearchDescription" in anonymous.get("/opensearch_desc.php").text, "no opensearch_desc.php")

    image = picture(1200, 800)
    name = "Möwe_&_Co.png"
    path = file_path(name)
    with r.check("file: uploaded and back byte for byte") as check:
        fields = {"action": "upload", "format": "json", "filename": name, "ignorewarnings": "1", "token": api.token("csrf")}
        answer = json.loads(client.upload("/api.php", fields, {"file": ("x.png", image)}).text)
        same(answer.get("upload", {}).get("result"), "Success", f"upload {answer}")
        same(answer["upload"]["imageinfo"]["url"], f"{r.base}/images/{path}", "its URL")
        back = anonymous.get(f"/images/{path}")
        holds(back.body == image, f"{back.status}, {len(back.body)} bytes of {len(image)}")
        same((back.headers["Content-Type"], back.headers["X-Content-Type-Options"]), ("image/png", "nosniff"), "headers")
        part = anonymous.get(f"/images/{path}", {"Range": "bytes=1000-1999"})
        holds((part.status, part.body) == (206, image[1000:2000]), f"range: {part.status}, {len(part.body)} bytes")
        check.figures = f"/images/{path}, {len(image)} bytes"
    with r.check("thumbnails: made on demand, then sent as files") as check:
        thumb = f"/images/thumb/{path}/240px-{quote(name)}"
        on_disk = r.shared / "images/thumb" / path.rsplit("/", 1)[0] / name / f"240px-{name}"
        made = anonymous.get(thumb)
        holds(made.status == 200 and size_of(made.body)[0] == 240, f"{thumb}: {made.status} {made.body[:300]}")
        holds(on_disk.exists(), f"it is not kept: {on_disk}")
        # Slackwater believes for a second that it is not there; PHP answers meanwhile.
        sent = until(lambda: (answer := anonymous.get(thumb)).headers["Accept-Ranges"] and answer, "a file is sent", 5)
        holds(sent.body == made.body, f"as a file: {sent.status}, {len(sent.body)} bytes")
        small = anonymous.get(f"/thumb.php?f={quote(name)}&width=80")
        holds(small.status == 200 and size_of(small.body)[0] == 80, f"thumb.php: {small.status}")
        gone = anonymous.get(f"/images/thumb/{file_path('None.png')}/240px-None.png")
        holds(gone.status == 404 and "thumb" in gone.text.lower(), f"of a file that is not there: {gone.status} {gone.text[:200]}")
        api.edit("Picture", f"[[File:{name}|thumb|300px]]")
        source = re.search(r'<img[^>]* src="([^"]+)"', anonymous.get("/wiki/Picture").text.split("thumbinner")[-1])[1]
        holds(anonymous.get(source.replace("&amp;", "&")).status == 200, source)
        check.figures = f"{thumb}, {len(made.body)} bytes"

    with r.check("what is denied is 404") as check:
        (r.shared / "images/evil.php").write_text("<?php echo 'ran'; $secret = 1;")
        (r.shared / "images/deleted").mkdir(exist_ok=True)
        (r.shared / "images/deleted/x.png").write_text("$secret")
        check.figures = r.denied(*DENIED, f"/images/{path}/x.php")

    browser = r.browse()
    with r.swapping():
        with r.check("browser: login"):
            browser.open("/wiki/Special:UserLogin")
            browser.type("#wpName1", USER)
            browser.type("#wpPassword1", PASSWORD)
            browser.click("#wpLoginAttempt")
            browser.find("#pt-userpage, #pt-userpage-2")
        with r.check("browser: edits the source of a page"):
            browser.open("/index.php?title=Browser%3F&action=edit")
            browser.type("#wpTextbox1", "Written in the '''browser''', жд.")
            browser.click("#wpSave")
            browser.wait(
                lambda: "Written in the browser, жд." in browser.find("#mw-content-text .mw-parser-output").text, "the page that was written"
            )
            same(browser.where(), f"{r.base}/wiki/Browser%3F", "where saving leads")
        with r.check("browser: edits it in the visual editor"):
            browser.open("/wiki/Browser%3F?veaction=edit")
            browser.wait(lambda: browser.script("return !!ve.init.target.getSurface().getView().getDocument()"), "the editor")
            browser.script("ve.init.target.getSurface().getModel().getLinearFragment(new ve.Range(1)).insertContent('Seen. ')")
            browser.click(".oo-ui-tool-name-showSave a")
            browser.click(".ve-ui-mwSaveDialog.oo-ui-window-ready .oo-ui-processDialog-actions-primary a")
            browser.wait(lambda: not browser.driver.find_elements("css selector", ".ve-ce-documentNode"), "the editor has closed", 60)
            browser.wait(lambda: "Seen." in browser.find("#mw-content-text .mw-parser-output").text, "the page that was written")
            holds("Seen." in anonymous.get("/wiki/Browser%3F?action=raw").text, "it is not saved")
        with r.check("browser: uploads a picture") as check:
            file = r.folder / "tmp/browser.png"
            file.write_bytes(image)
            browser.open("/wiki/Special:Upload")
            browser.find("#wpUploadFile").send_keys(str(file))
            browser.script("document.querySelector('#wpDestFile').value = 'Прилив.png'")
            browser.script("document.querySelector('#wpIgnoreWarning').checked = true")
            browser.click("input[name=wpUpload]")
            browser.wait(lambda: browser.where() == f"{r.base}/wiki/File:{quote('Прилив.png')}", "the page of the file", 60)
            holds(anonymous.get(f"/images/{file_path('Прилив.png')}").body == image, "it is not the same picture")
            check.figures = f"{len(image)} bytes"
        with r.check("browser: looks around") as check:
            pages = (
                "Main_Page",
                "A//B",
                "Picture",
                f"File:{quote(name)}",
                *(f"Special:{name}" for name in ("RecentChanges", "AllPages", "ListFiles", "Preferences", "Version", "Search", "Watchlist")),
            )
            for page in pages:
                browser.open(f"/wiki/{page}")
                browser.wait(lambda: browser.script("return document.readyState") == "complete", "the page is whole")
            check.figures = f"{len(pages)} pages"
    r.closing_checks()
    return f"MediaWiki {r.version('mediawiki')} on SQLite"
