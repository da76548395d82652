"""DokuWiki: no database, two kinds of nice URLs, media that X-Accel-Redirect sends."""

import re
import shutil
from urllib.parse import quote

from stand import COLOURS, Client, copy_code, holds, picture, replace_in, same, until

USER, PASSWORD = "admin", "correct horse battery"
PAGE = "grüße:привет_мир"
DENIED = """
/data/ /data /data/pages/wiki/syntax.txt /data/media/bilder/m%C3%B6we.png
/conf/ /conf/users.auth.php /conf/local.php /conf/mime.conf /%63onf/mime.conf /lib/../conf/mime.conf //conf//mime.conf
/inc/ /inc/init.php /inc/lang/en/lang.php /inc/.htaccess /bin/ /bin/indexer.php /vendor/ /vendor/autoload.php
/VERSION /.htaccess /lib/plugins/config/admin.php /lib/tpl/dokuwiki/main.php
""".split()
TEXT = "====== Zeichen ======\n\nÄpfel, мир, 日本語 and **bold**.\n"


def install_code(r):
    for colour in COLOURS:
        code = r.folder / colour
        copy_code(r.unpacked, "usr/share/dokuwiki", code)
        # Debian's own places become DokuWiki's own again: conf and data below the root, where they must be denied.
        replace_in(code, "*.php", "/etc/dokuwiki", f"{code}/conf")
        replace_in(code, "*.php", "/usr/share/php", f"{r.unpacked}/usr/share/php")
        replace_in(code, "*.php", "/usr/share/javascript", f"{r.unpacked}/usr/share/javascript")
        # Both copies share what changes.
        (code / "conf").symlink_to(r.shared / "conf")
        (code / "data").symlink_to(r.shared / "data")
    copy_code(r.unpacked, "etc/dokuwiki", r.shared / "conf")
    replace_in(r.shared / "conf", "*.php", "/var/lib/dokuwiki/data", "./data")
    for made in ("local.php", "users.auth.php", "acl.auth.php"):
        (r.shared / "conf" / made).unlink(missing_ok=True)
    shutil.copytree(r.unpacked / "var/lib/dokuwiki/data", r.shared / "data")


def settings(r, **values):
    """What no form of DokuWiki writes over."""
    lines = "".join(f"$conf['{name}'] = {value};\n" for name, value in {"deaccent": 0, "send404": 1, "fnencode": "'utf-8'", **values}.items())
    (r.shared / "conf/local.protected.php").write_text(f"<?php\n{lines}")


def log_in(r):
    client = Client(r.port)
    form = client.get("/doku.php?id=start&do=login")
    answer = client.post("/doku.php", {"sectok": form.field("sectok"), "id": "start", "do": "login", "u": USER, "p": PASSWORD})
    same(answer.status, 302, "status of the login")
    same(answer.location, f"{r.base}/doku.php?id=start", "where the login leads")
    holds('class="action logout"' in client.get("/doku.php?id=start").text, "nobody is logged in")
    return client


def save(client, page, text):
    form = client.get(f"/doku.php?id={quote(page)}&do=edit")
    fields = {name: form.field(name) for name in ("sectok", "id", "rev", "date", "prefix", "suffix", "changecheck")}
    return client.post("/doku.php", {**fields, "do[save]": "1", "wikitext": text, "summary": "made"})


def unchanged(client, target):
    return client.get(target, {"If-None-Match": client.get(target).headers["ETag"]}).status == 304


def drive(r):
    install_code(r)
    settings(r)
    r.start()
    anonymous = r.client

    with r.check("install.php"):
        form = {"title": "Tide", "acl": "on", "superuser": USER, "fullname": "Ada", "email": "ada@example.com", "policy": "1", "license": "cc-by-sa"}
        fields = {f"d[{name}]": value for name, value in {**form, "password": PASSWORD, "confirm": PASSWORD}.items()}
        answer = anonymous.post("/install.php", {**fields, "submit": "", "l": "en"})
        holds("configuration was finished successfully" in answer.text, f"{answer.status} {answer.text[-3000:]}")
        holds("$2y$" in (r.shared / "conf/users.auth.php").read_text(), "no bcrypt password in users.auth.php")
    with r.check("a reload takes install.php away"):
        text = r.configuration.read_text()
        r.configuration.write_text(text.replace('"/install.php", ', ""))
        r.slackwater.command("reload")
        r.denied("/install.php")

    with r.check("login"):
        client = log_in(r)
        wrong = Client(r.port)
        wrong.post("/doku.php", {"sectok": wrong.get("/doku.php?do=login").field("sectok"), "do": "login", "u": USER, "p": "no"})
        holds('class="action logout"' not in wrong.get("/doku.php").text, "a wrong password is good enough")
    with r.check("a page with a name in UTF-8, written and read") as check:
        answer = save(client, PAGE, TEXT)
        same((answer.status, answer.location), (302, f"{r.base}/doku.php?id={quote(PAGE, safe=':')}"), "saving")
        page = anonymous.get(answer.location.removeprefix(r.base))
        holds("Äpfel, мир, 日本語 and <strong>bold</strong>" in page.text, page.text[:300])
        same(anonymous.get(f"/doku.php?id={quote(PAGE)}&do=export_raw").text.strip(), TEXT.strip(), "the raw text")
        same(save(client, "start", "====== Start ======\n\n[[wiki:syntax]]").status, 302, "saving the first page")
        check.figures = answer.location.removeprefix(r.base)

    image = picture(640, 400)
    with r.check("media: uploaded and back byte for byte") as check:
        token = client.get("/lib/exe/mediamanager.php?ns=bilder").field("sectok")
        answer = client.upload("/lib/exe/mediamanager.php", {"sectok": token, "ns": "bilder", "mediaid": "möwe.png"}, {"upload": ("x.png", image)})
        same(answer.status, 200, "status of the upload")
        back = anonymous.get(f"/lib/exe/fetch.php?media={quote('bilder:möwe.png')}")
        holds(back.body == image, f"{back.status}, {len(back.body)} bytes of {len(image)}")
        same(back.headers["Content-Type"], "image/png", "Content-Type")
        check.figures = f"{len(image)} bytes"
    for name in ("gull.png", "möwe.png"):
        with r.check(f"media: {name} by X-Accel-Redirect, and a range of it") as check:
            if name != "möwe.png":
                client.upload("/lib/exe/mediamanager.php", {"sectok": token, "ns": "bilder", "mediaid": name}, {"upload": ("x.png", image)})
            settings(r, xsendfile=3)
            target = f"/lib/exe/fetch.php?media={quote('bilder:' + name)}"
            back = anonymous.get(target)
            holds(back.body == image, f"{target}: {back.status}, {len(back.body)} bytes of {len(image)}: {back.text[:200]}")
            part = anonymous.get(target, {"Range": "bytes=1000-1999"})
            holds((part.status, part.body) == (206, image[1000:2000]), f"range: {part.status}, {len(part.body)} bytes")
            check.figures = part.headers["Content-Range"]
    settings(r)
    with r.check("media: a picture made smaller") as check:
        page = save(client, "bild", "{{bilder:möwe.png?200}}")
        text = anonymous.get(page.location.removeprefix(r.base)).text
        source = re.search(r'"(/lib/exe/fetch\.php\?w=200[^"]*)"', text)[1].replace("&amp;", "&")
        small = anonymous.get(source)
        same((small.status, small.headers["Content-Type"]), (200, "image/png"), source)
        check.figures = f"{len(small.body)} bytes"

    with r.check("userewrite = 2: doku.php/namespace:page"):
        settings(r, userewrite=2)
        page = anonymous.get(f"/doku.php/{quote(PAGE, safe='')}")
        holds("日本語" in page.text, f"{page.status} {page.text[:300]}")
        holds(f"/doku.php/{quote(PAGE, safe=':')}" in page.text, "no link of that kind in the page")
        holds(anonymous.get("/lib/exe/fetch.php/bilder:m%C3%B6we.png").body == image, "fetch.php/bilder:möwe.png is not the picture")
        same(anonymous.get("/doku.php/keine:seite").status, 404, "status of a page that is not there")
        answer = save(client, "zwei:seite", "two")
        same(answer.location, f"{r.base}/doku.php/zwei:seite", "where saving leads")
        r.redirects("/doku.php/zwei:", "/doku.php/zwei:start")
    with r.check("userewrite = 1: /namespace:page, /_media, /_detail, /_export"):
        settings(r, userewrite=1)
        page = anonymous.get(f"/{quote(PAGE, safe='')}")
        holds("日本語" in page.text, f"{page.status} {page.text[:300]}")
        holds(anonymous.get("/_media/bilder:m%C3%B6we.png").body == image, "/_media/ is not the picture")
        detail = anonymous.get("/_detail/bilder:m%C3%B6we.png?id=start")
        holds(detail.status == 200 and "/_media/bilder:m%C3%B6we.png" in detail.text, f"/_detail/: {detail.status}")
        same(anonymous.get(f"/_export/raw/{quote(PAGE, safe='')}").text.strip(), TEXT.strip(), "/_export/raw/")
        edit = client.get("/zwei:seite?do=edit")
        holds(re.search(r">\s*two\s*</textarea>", edit.text), f"the client's query is lost: {edit.status}")
        holds('"id":"rock_roll"' in anonymous.get("/rock%26roll?do=recent").text, "a & of the path has become one of the query")
        same(anonymous.get("/keine:seite").status, 404, "status of a page that is not there")
        answer = save(client, "eins:seite", "one")
        same(answer.location, f"{r.base}/eins:seite", "where saving leads")
        r.redirects("/eins:", "/eins:start")
    with r.check("userewrite = 1 and useslash: /namespace/page"):
        settings(r, userewrite=1, useslash=1)
        page = anonymous.get("/" + quote(PAGE.replace(":", "/")))
        holds("日本語" in page.text, f"{page.status} {page.text[:300]}")
        same(save(client, "eins:zwei:drei", "3").location, f"{r.base}/eins/zwei/drei", "where saving leads")
        r.redirects("/eins/", "/eins/start")
        settings(r, userewrite=1)

    with r.check("what is denied is 404") as check:
        check.figures = r.denied(*DENIED)
    with r.check("stylesheet, scripts, feed"):
        page = anonymous.get("/start").text
        for part in ("/lib/exe/css.php", "/lib/exe/js.php", "/lib/exe/jquery.php"):
            source = next(piece for piece in page.split('"') if piece.startswith(part)).replace("&amp;", "&")
            answer = anonymous.get(source)
            holds(answer.status == 200 and len(answer.body) > 10_000, f"{source}: {answer.status}, {len(answer.body)} bytes")
            # DokuWiki makes it anew as long as its settings are not older.
            until(lambda: unchanged(anonymous, source), f"{source} is 304", 5)
        holds("<rdf:RDF" in anonymous.get("/feed.php").text, "no feed")

    browser = r.browse()
    # What DokuWiki's own check of its security asks for, and must not get.
    browser.expected = "/data/dont-panic"
    with r.swapping():
        with r.check("browser: login"):
            browser.open("/start?do=login")
            browser.type("input[name=u]", USER)
            browser.type("input[name=p]", PASSWORD)
            browser.click("#dw__login button[type=submit]")
            browser.find(".action.logout")
        with r.check("browser: writes a page"):
            browser.open(f"/{quote('browser:страница')}?do=edit")
            browser.type("#wiki__text", "Written by a **browser**, ж.")
            browser.click("#edbtn__save")
            browser.wait(lambda: "Written by a" in browser.find("#dokuwiki__content").text, "the page that was written")
        with r.check("browser: uploads a picture"):
            file = r.folder / "tmp/browser.png"
            file.write_bytes(image)
            browser.open("/start?do=media&ns=bilder&tab_files=upload")
            browser.find(".qq-upload-button input[type=file]").send_keys(str(file))
            browser.click("#mediamanager__upload_button")
            browser.find(".qq-upload-success", 60)
            holds(anonymous.get("/_media/bilder:browser.png").body == image, "it is not the same picture")
        with r.check("browser: looks around") as check:
            places = (
                "/",
                "/wiki:syntax",
                "/start?do=recent",
                "/start?do=index",
                "/start?do=admin",
                "/start?do=admin&page=config",
                "/bild",
                "/start?do=media&ns=bilder&image=bilder:browser.png",
            )
            for place in places * 2:
                browser.open(place)
            check.figures = f"{2 * len(places)} pages"
    with r.check("the browser has spoken HTTP/2 over TLS, and nothing else") as check:
        same(list(browser.protocols), ["h2"], "protocols")
        check.figures = f"{browser.protocols['h2']} answers"
    with r.check("DokuWiki's own check of its security") as check:
        holds(browser.as_expected, "the administration has not asked for the picture in /data")
        r.denials += browser.as_expected
    r.closing_checks()
    return f"DokuWiki {r.version('dokuwiki')}"
