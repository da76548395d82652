"""WordPress on MariaDB: installer, permalinks, REST, wp-cron, block editor, uploads.

Not on SQLite: the plugin for that (sqlite-database-integration) gives up with "database is locked" when two requests write at once.
"""

import json
import os
import pwd
import re
import subprocess
from datetime import datetime, timedelta, timezone
from xml.sax.saxutils import escape

from stand import COLOURS, Client, Wrong, copy_code, holds, picture, same, size_of, until

USER, PASSWORD = "ada", "correct horse battery"

DENIED = """
/wp-config.php /wp-config.php.bak /wp-config.php/x /wp-settings.php /wp-load.php /wp-blog-header.php /wp-includes/version.php
/wp-admin/includes/file.php /wp-content/plugins/index.php /wp-content/plugins/akismet/akismet.php
/wp-content/themes/twentytwentythree/patterns/hidden-404.php /.htaccess /wp-includes/none.js /none.png
""".split()
ADMINISTRATION = "edit upload themes plugins users profile tools options-general options-permalink site-health site-editor"

CONFIGURATION = """<?php
define( 'DB_NAME', 'wordpress' );
define( 'DB_USER', 'root' );
define( 'DB_PASSWORD', '' );
define( 'DB_HOST', 'localhost:{folder}/mariadb.sock' );
define( 'WP_HTTP_BLOCK_EXTERNAL', true );
define( 'AUTOMATIC_UPDATER_DISABLED', true );
define( 'DISALLOW_FILE_MODS', true );
{keys}
$table_prefix = 'wp_';
defined( 'ABSPATH' ) || define( 'ABSPATH', __DIR__ . '/' );
require_once ABSPATH . 'wp-settings.php';
"""


def install_code(r):
    (r.shared / "uploads").mkdir()
    names = ("AUTH_KEY", "SECURE_AUTH_KEY", "LOGGED_IN_KEY", "NONCE_KEY", "AUTH_SALT", "SECURE_AUTH_SALT", "LOGGED_IN_SALT", "NONCE_SALT")
    keys = "".join(f"define( '{name}', '{name} of a test' );\n" for name in names)
    for colour in COLOURS:
        code = r.folder / colour
        copy_code(r.unpacked, "usr/share/wordpress", code)
        (code / "wp-content/uploads").symlink_to(r.shared / "uploads")
        (code / "wp-config.php").write_text(CONFIGURATION.format(folder=r.folder, keys=keys))


def start_database(r):
    data, socket, log = r.shared / "mariadb", r.folder / "mariadb.sock", open(r.folder / "mariadb.log", "w")
    user = pwd.getpwuid(os.geteuid()).pw_name
    install = [
        "mariadb-install-db",
        "--no-defaults",
        f"--datadir={data}",
        f"--user={user}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    ]
    subprocess.run(install, stdout=log, stderr=log, check=True)
    (r.folder / "mariadb.sql").write_text("CREATE DATABASE IF NOT EXISTS wordpress CHARACTER SET utf8mb4;\n")
    serve = ["/usr/sbin/mariadbd", "--no-defaults", f"--datadir={data}", f"--user={user}", f"--socket={socket}", "--skip-networking"]
    database = subprocess.Popen([*serve, f"--pid-file={r.folder}/mariadb.pid", f"--init-file={r.folder}/mariadb.sql"], stdout=log, stderr=log)
    r.stack.callback(lambda: (database.terminate(), database.wait(30)))
    until(socket.exists, f"MariaDB listens, see {r.folder}/mariadb.log", 60)


def log_in(r):
    client = Client(r.port)
    client.get("/wp-login.php")
    answer = client.post(
        "/wp-login.php", {"log": USER, "pwd": PASSWORD, "wp-submit": "Log In", "redirect_to": f"{r.base}/wp-admin/", "testcookie": "1"}
    )
    same((answer.status, answer.location), (302, f"{r.base}/wp-admin/"), "login")
    return client


class Rest:
    def __init__(self, client):
        self.client = client
        self.nonce = client.get("/wp-admin/admin-ajax.php?action=rest-nonce").text

    def __call__(self, method, path, fields=None, status=200):
        body = json.dumps(fields).encode() if fields is not None else None
        answer = self.client.request(method, f"/wp-json{path}", body, {"Content-Type": "application/json", "X-WP-Nonce": self.nonce})
        if answer.status != status:
            raise Wrong(f"{method} {path}: {answer.status} {answer.text[:300]}")
        return json.loads(answer.text)


def drive(r):
    install_code(r)
    start_database(r)
    r.start()
    anonymous = r.client

    with r.check("what is not installed leads to the installer"):
        r.redirects("/", "/wp-admin/install.php")
    with r.check("installer") as check:
        holds("Welcome" in anonymous.get("/wp-admin/install.php").text, "no form")
        fields = {
            "weblog_title": "Tide",
            "user_name": USER,
            "admin_password": PASSWORD,
            "admin_password2": PASSWORD,
            "pw_weak": "on",
            "admin_email": "ada@example.com",
        }
        answer = anonymous.post("/wp-admin/install.php?step=2", {**fields, "blog_public": "1", "language": "", "Submit": "Install WordPress"})
        holds("Success!" in answer.text, f"{answer.status} {answer.text[-1500:]}")
        # The installer asks its own site, through Slackwater, whether pretty permalinks work.
        answer = anonymous.get("/?p=1")
        holds(
            re.fullmatch(r"/\d{4}/\d\d/\d\d/hello-world/", answer.location.removeprefix(r.base)),
            f"the installer has not seen permalinks work: {answer.status} {answer.location}",
        )
        check.figures = f"permalinks as it found them to work: {answer.location.removeprefix(r.base)}"

    with r.check("login"):
        client = log_in(r)
        rest = Rest(client)
    with r.check("redirects keep the port"):
        r.redirects("/wp-admin", "/wp-admin/", 301)
        r.redirects("/wp-admin?a=b", "/wp-admin/?a=b", 301)
        answer = anonymous.get("/wp-admin/")
        holds(answer.status == 302 and answer.location.startswith(f"{r.base}/wp-login.php?redirect_to="), f"{answer.status} {answer.location}")
        r.redirects("/login", "/wp-login.php", 302)
    with r.check("permalinks /%year%/%monthnum%/%postname%/") as check:
        form = client.get("/wp-admin/options-permalink.php")
        # WordPress offers them without /index.php only where it believes that the server can do it.
        prefixed = 'value="/index.php/' in form.text
        fields = {"_wpnonce": form.field("_wpnonce"), "_wp_http_referer": "/wp-admin/options-permalink.php", "category_base": "", "tag_base": ""}
        answer = client.post(
            "/wp-admin/options-permalink.php",
            {**fields, "selection": "custom", "permalink_structure": "/%year%/%monthnum%/%postname%/", "submit": "Save"},
        )
        same(answer.status, 302, "saving them")
        # The page it leads to writes the rules.
        client.get(answer.location.removeprefix(r.base))
        place = anonymous.get("/?p=1").location.removeprefix(r.base)
        holds(re.fullmatch(r"/\d{4}/\d\d/hello-world/", place), f"?p=1 leads to {place}")
        page = anonymous.get(place)
        holds(page.status == 200 and "Welcome to WordPress" in page.text, f"{place}: {page.status}")
        r.redirects(place.rstrip("/"), place, 301)
        check.figures = f"{place}; " + ("its form offers them with /index.php only" if prefixed else "its form offers them without /index.php")
    with r.check("a post whose name is in UTF-8"):
        post = rest("POST", "/wp/v2/posts", {"title": "Äpfel и море", "content": "<p>日本語</p>", "status": "publish"}, 201)
        page = anonymous.get(post["link"].removeprefix(r.base))
        holds(page.status == 200 and "日本語" in page.text, f"{post['link']}: {page.status}")
    # Wants a minute, which is long over when the rest is done.
    soon = datetime.now(timezone.utc) + timedelta(seconds=63)
    scheduled = rest("POST", "/wp/v2/posts", {"title": "Later", "status": "future", "date_gmt": f"{soon:%Y-%m-%dT%H:%M:%S}"}, 201)

    with r.check("REST: /wp-json/, by GET, POST, PUT, DELETE, and with ?rest_route=") as check:
        same(json.loads(anonymous.get("/wp-json/").text)["name"], "Tide", "name")
        posts = anonymous.get("/wp-json/wp/v2/posts?per_page=1&orderby=id&order=asc")
        same((json.loads(posts.text)[0]["slug"], posts.headers["X-WP-Total"]), ("hello-world", "2"), "posts")
        same(json.loads(anonymous.get("/?rest_route=/wp/v2/posts/1").text)["id"], 1, "?rest_route=")
        one = rest("POST", "/wp/v2/posts", {"title": "One", "status": "draft"}, 201)["id"]
        same(rest("PUT", f"/wp/v2/posts/{one}", {"title": "Two"})["title"]["raw"], "Two", "title after PUT")
        same(rest("DELETE", f"/wp/v2/posts/{one}?force=true")["deleted"], True, "deleted")
        same(anonymous.get(f"/wp-json/wp/v2/posts/{one}").status, 404, "status of what is deleted")
        same(anonymous.post("/wp-json/wp/v2/posts", {"title": "no"}).status, 401, "status without a login")
        check.figures = f"{len(json.loads(anonymous.get('/wp-json/').text)['routes'])} routes"
    with r.check("feed, comments, sitemap, robots.txt, favicon.ico"):
        feed = anonymous.get("/feed/")
        holds(feed.status == 200 and feed.headers["Content-Type"].startswith("application/rss+xml") and "<rss" in feed.text, f"feed: {feed.status}")
        same(
            anonymous.get("/feed/", {"If-None-Match": feed.headers["ETag"], "If-Modified-Since": feed.headers["Last-Modified"]}).status,
            304,
            "feed again",
        )
        answer = anonymous.post(
            "/wp-comments-post.php", {"comment": "Ahoy", "author": "Bo", "email": "bo@example.com", "comment_post_ID": "1", "comment_parent": "0"}
        )
        holds(
            answer.status == 302 and "hello-world/" in answer.location and answer.location.startswith(r.base),
            f"comment: {answer.status} {answer.location}",
        )
        holds("<sitemapindex" in anonymous.get("/wp-sitemap.xml").text, "no sitemap")
        holds("Disallow: /wp-admin/" in anonymous.get("/robots.txt").text, "no robots.txt")
        r.redirects("/favicon.ico", "/wp-includes/images/w-logo-blue-white-bg.png", 302)
    with r.check("404 is WordPress's page, with its status"):
        page = anonymous.get("/no/such/page/")
        holds(page.status == 404 and "could not be found" in page.text, f"{page.status} {page.text[:200]}")
    with r.check("xmlrpc.php runs, as the preset says"):
        parameters = "".join(f"<param><value>{escape(value)}</value></param>" for value in (USER, PASSWORD))
        call = f"<methodCall><methodName>wp.getUsersBlogs</methodName><params>{parameters}</params></methodCall>"
        answer = anonymous.request("POST", "/xmlrpc.php", call.encode(), {"Content-Type": "text/xml"})
        holds(answer.status == 200 and "<name>blogName</name><value><string>Tide</string>" in answer.text, f"{answer.status} {answer.text[:300]}")
        same(anonymous.get("/xmlrpc.php").status, 405, "status of a GET")

    image = picture(1200, 800)
    with r.check("media by REST: back byte for byte, thumbnails, a range") as check:
        head = {"Content-Type": "image/png", "Content-Disposition": 'attachment; filename="gull.png"', "X-WP-Nonce": rest.nonce}
        answer = client.request("POST", "/wp-json/wp/v2/media", image, head)
        same(answer.status, 201, f"status, {answer.text[:300]}")
        media = json.loads(answer.text)
        sizes = media["media_details"]["sizes"]
        for name, size in sizes.items():
            back = anonymous.get(size["source_url"].removeprefix(r.base))
            holds(back.status == 200 and size_of(back.body) == (size["width"], size["height"]), f"{name}: {back.status}, {len(back.body)} bytes")
        path = media["source_url"].removeprefix(r.base)
        back = anonymous.get(path)
        holds(back.body == image, f"{back.status}, {len(back.body)} bytes of {len(image)}")
        part = anonymous.get(path, {"Range": "bytes=1000-1999"})
        holds((part.status, part.body) == (206, image[1000:2000]), f"range: {part.status}, {len(part.body)} bytes")
        same(anonymous.get(path, {"If-None-Match": back.headers["ETag"]}).status, 304, "status of it again")
        check.figures = f"{path}, {len(image)} bytes, {len(sizes)} sizes"
    with r.check("PHP in uploads does not run, and shows no source") as check:
        month = r.shared / "uploads/2026"
        month.mkdir(exist_ok=True)
        for name in ("evil.php", "evil.phtml", "evil.php.bak", "evil.PHP", "evil.png.php"):
            (month / name).write_text("<?php echo 'ran ' . 6 * 7; $secret = 1;")
        (month / "gull.png").write_bytes(b"<?php echo 'ran'; $secret = 1;")
        names = (
            "evil.php evil.phtml evil.php.bak evil.PHP evil.png.php evil.php/x evil.php/x.png evil%2ephp evil.php%20 gull.png/x.php ../2026/evil.php"
        )
        check.figures = r.denied(*(f"/wp-content/uploads/2026/{name}" for name in names.split()))
    with r.check("what is denied is 404") as check:
        (r.folder / "blue/wp-config.php.bak").write_text("<?php $secret = 1;")
        check.figures = r.denied(*DENIED)
    with r.check("Site Health: WordPress reaches itself"):
        answer = rest("GET", "/wp-site-health/v1/tests/loopback-requests")
        same(answer["status"], "good", answer["description"][:300])

    browser = r.browse()
    with r.swapping():
        with r.check("browser: login"):
            browser.open("/wp-login.php")
            # WordPress puts the cursor into the first field a moment after the page is there.
            browser.wait(lambda: browser.script("return document.activeElement.id") == "user_login", "the cursor in the first field")
            browser.type("#user_login", USER)
            browser.type("#user_pass", PASSWORD)
            browser.click("#wp-submit")
            browser.wait(lambda: browser.where() == f"{r.base}/wp-admin/", "the dashboard")
        with r.check("browser: writes a post in the block editor") as check:
            browser.open("/wp-admin/post-new.php")
            browser.find(".editor-post-title__input")
            browser.script("wp.data.dispatch('core/preferences').set('core/edit-post', 'welcomeGuide', false)")
            browser.wait(lambda: not browser.driver.find_elements("css selector", ".components-modal__screen-overlay"), "no guide in the way")
            browser.click(".editor-post-title__input")
            browser.find(".editor-post-title__input").send_keys("Ебб и flood\n")
            browser.driver.switch_to.active_element.send_keys("Written in the block editor, жд.")
            browser.click(".editor-post-publish-panel__toggle")
            browser.click(".editor-post-publish-panel .editor-post-publish-button")
            link = browser.find(".post-publish-panel__postpublish-header a").get_attribute("href")
            browser.open(link)
            holds("Written in the block editor, жд." in browser.find(".entry-content").text, f"{link} has not what was written")
            check.figures = link.removeprefix(r.base)
        with r.check("browser: uploads a picture in wp-admin") as check:
            file = r.folder / "tmp/browser.png"
            file.write_bytes(image)
            browser.open("/wp-admin/media-new.php?browser-uploader=0")
            browser.find("input[type=file][id^=html5_]").send_keys(str(file))
            browser.find("#media-items .edit-attachment", 60)
            media = rest("GET", "/wp/v2/media?search=browser")[0]
            path = media["source_url"].removeprefix(r.base)
            holds(anonymous.get(path).body == image, "it is not the same picture")
            check.figures = f"{path}, {len(image)} bytes"
        with r.check("browser: looks around") as check:
            pages = ["", *(f"{name}.php" for name in ADMINISTRATION.split())]
            places = ["/", "/feed/", "/2026/", "/author/ada/", "/?s=flood", *(f"/wp-admin/{page}" for page in pages)]
            for place in places:
                browser.open(place)
                browser.wait(lambda: browser.script("return document.readyState") == "complete", "the page is whole")
            check.figures = f"{len(places)} pages"
    with r.check("wp-cron publishes what was scheduled"):

        def published():
            anonymous.get("/")
            return anonymous.get(f"/wp-json/wp/v2/posts/{scheduled['id']}").status == 200

        until(published, "the post is out", 90, pause=2)
    r.closing_checks({"bad_request": "WordPress's cron asks by https, on a port without TLS, whether there is https"})
    return f"WordPress {r.version('wordpress')} on MariaDB"
