use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
};

use http::header::{IF_NONE_MATCH, RANGE};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use tempfile::TempDir;

use super::*;
use crate::http::route::Index;

/// Two runtimes as in the proxy: the worker's, and one whose blocking pool does the work.
struct Rig {
    dir: TempDir,
    files: Files,
    precompressed: Vec<Coding>,
    worker: tokio::runtime::Runtime,
    _pool: tokio::runtime::Runtime,
}

impl Rig {
    fn new(limits: FileLimits) -> Rig {
        let pool = tokio::runtime::Builder::new_current_thread().max_blocking_threads(2).build().unwrap();
        let worker = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let files = Files::new(pool.handle().clone(), limits);
        Rig { dir: tempfile::tempdir().unwrap(), files, precompressed: Vec::new(), worker, _pool: pool }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.root().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn serve(
        &self,
        method: Method,
        headers: &[(http::HeaderName, &str)],
        symlinks: &Symlinks,
        steps: Vec<Step>,
    ) -> Result<Served<'static>, Error> {
        let headers: HeaderMap = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
        let request = FileRequest { method: &method, headers: &headers, path: b"/dir\\x", query: Some("q=1") };
        let lookup = Lookup { steps, otherwise: Otherwise::NotFound };
        let around = Around { root: &self.root(), symlinks, precompressed: &self.precompressed, may_be_old: true };
        self.worker.block_on(self.files.serve(request, around, lookup))
    }

    fn get(&self, path: &str, headers: &[(http::HeaderName, &str)]) -> Response<FileBody> {
        match self.serve(Method::GET, headers, &Symlinks::Follow, vec![file(path)]) {
            Ok(Served::Response(response)) => response,
            other => panic!("{other:?}"),
        }
    }

    fn body(&self, response: Response<FileBody>) -> Vec<u8> {
        self.worker.block_on(response.into_body().collect()).unwrap().to_bytes().to_vec()
    }

    /// Whether the file is found under this policy.
    fn found(&self, path: &str, symlinks: &Symlinks) -> bool {
        match self.serve(Method::GET, &[], symlinks, vec![file(path)]) {
            Ok(Served::Response(response)) => response.status() == StatusCode::OK,
            Ok(Served::NotFound) => false,
            other => panic!("{other:?}"),
        }
    }
}

fn file(path: &str) -> Step {
    Step::File(path.as_bytes().to_vec())
}

fn header<'a>(response: &'a Response<FileBody>, name: &str) -> &'a str {
    response.headers().get(name).map(|value| value.to_str().unwrap()).unwrap_or_default()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

#[test]
fn a_small_file() {
    let rig = Rig::new(FileLimits::default());
    rig.write("a.css", "body{}");
    let response = rig.get("/a.css", &[]);
    assert_eq!(response.status(), 200);
    assert_eq!(header(&response, "content-type"), "text/css; charset=utf-8");
    assert_eq!(header(&response, "content-length"), "6");
    assert_eq!(header(&response, "accept-ranges"), "bytes");
    assert!(header(&response, "etag").ends_with("-6\""));
    assert!(header(&response, "last-modified").ends_with(" GMT"));
    assert_eq!(response.body().size_hint().exact(), Some(6));
    let etag = header(&response, "etag").to_owned();
    assert_eq!(rig.body(response), b"body{}");
    let response = rig.get("/a.css", &[(IF_NONE_MATCH, &etag)]);
    assert_eq!(response.status(), 304);
    assert!(response.body().is_end_stream() && !response.headers().contains_key(CONTENT_LENGTH));
}

#[test]
fn large_files_are_streamed_whole() {
    for chunk_bytes in [0, 1 << 20] {
        let rig = Rig::new(FileLimits { tasks: 1, chunk_bytes, cache_bytes: 0 });
        for len in [65_536, 65_537, 1_000_003] {
            let content = pattern(len);
            rig.write("big.bin", &content);
            let response = rig.get("/big.bin", &[]);
            assert_eq!(response.body().size_hint().exact(), u64::try_from(len).ok());
            assert_eq!(rig.body(response), content);
        }
        let content = pattern(1_000_003);
        let response = rig.get("/big.bin", &[(RANGE, "bytes=100000-899999")]);
        assert_eq!(response.status(), 206);
        assert_eq!(header(&response, "content-range"), "bytes 100000-899999/1000003");
        assert_eq!(header(&response, "content-length"), "800000");
        assert_eq!(rig.body(response), content[100_000..900_000]);
        assert_eq!(rig.files.source.chunks.available_permits(), chunk_bytes / body::PERMIT_BYTES);
    }
}

#[test]
fn several_ranges_are_multipart() {
    let rig = Rig::new(FileLimits::default());
    rig.write("a.txt", pattern(300_000));
    for range in ["bytes=0-1,5-6", "bytes=0-99999,150000-249999"] {
        let response = rig.get("/a.txt", &[(RANGE, range)]);
        assert_eq!(response.status(), 206);
        let length: usize = header(&response, "content-length").parse().unwrap();
        let boundary = header(&response, "content-type").strip_prefix("multipart/byteranges; boundary=").unwrap().to_owned();
        let body = rig.body(response);
        assert_eq!(body.len(), length);
        let text = String::from_utf8_lossy(&body);
        assert_eq!(
            text.matches(&format!("\r\n--{boundary}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Range: bytes ")).count(),
            2
        );
        assert!(text.ends_with(&format!("\r\n--{boundary}--\r\n")));
    }
    let response = rig.get("/a.txt", &[(RANGE, "bytes=300000-")]);
    assert_eq!((response.status().as_u16(), header(&response, "content-range")), (416, "bytes */300000"));
}

#[test]
fn head_has_the_length_and_no_body_and_others_are_405() {
    let rig = Rig::new(FileLimits::default());
    rig.write("a.js", "x");
    let Ok(Served::Response(head)) = rig.serve(Method::HEAD, &[(RANGE, "bytes=0-0")], &Symlinks::Follow, vec![file("/a.js")])
    else {
        panic!()
    };
    assert_eq!((head.status().as_u16(), header(&head, "content-length")), (200, "1"));
    assert_eq!(header(&head, "content-type"), "text/javascript; charset=utf-8");
    assert!(head.body().is_end_stream());
    let Ok(Served::Response(post)) = rig.serve(Method::POST, &[], &Symlinks::Follow, vec![file("/a.js")]) else { panic!() };
    assert_eq!((post.status().as_u16(), header(&post, "allow")), (405, "GET, HEAD"));
}

#[test]
fn a_file_cut_while_it_is_sent_is_an_error() {
    let rig = Rig::new(FileLimits::default());
    let path = rig.write("big.bin", pattern(1 << 20));
    let response = rig.get("/big.bin", &[]);
    let mut body = response.into_body();
    rig.worker.block_on(async {
        assert!(body.frame().await.unwrap().is_ok());
        fs::File::options().write(true).open(path).unwrap().set_len(300_000).unwrap();
        let error = body.frame().await.unwrap().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
        assert!(body.frame().await.is_none());
    });
}

#[test]
fn only_regular_files_and_a_fifo_hangs_nobody() {
    let rig = Rig::new(FileLimits::default());
    rig.write("a", "");
    let fifo = rig.root().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(rig.root().join("socket")).unwrap();
    symlink("/dev/zero", rig.root().join("zero")).unwrap();
    symlink("loop", rig.root().join("loop")).unwrap();
    let long = "x".repeat(300);
    for path in ["/fifo", "/socket", "/zero", "/loop", "/none", "/a/b", "/", &format!("/{long}"), "/../root/a"] {
        assert!(!rig.found(path, &Symlinks::Follow), "{path}");
    }
    let response = rig.get("/a", &[]);
    assert_eq!(header(&response, "content-length"), "0");
    assert!(response.body().is_end_stream());
}

#[test]
fn symbolic_links() {
    let rig = Rig::new(FileLimits::default());
    let root = rig.root();
    rig.write("real/a.txt", "a");
    rig.write("../outside/secret", "s");
    rig.write("../storage/s.txt", "s");
    symlink("real/a.txt", root.join("relative")).unwrap();
    symlink(root.join("real/a.txt"), root.join("absolute")).unwrap();
    symlink("../outside/secret", root.join("escape")).unwrap();
    symlink(rig.dir.path().join("outside"), root.join("folder")).unwrap();
    symlink(rig.dir.path().join("storage"), root.join("storage")).unwrap();
    // A name that starts like the root's is another folder.
    rig.write("../root2/x", "x");
    symlink("../root2/x", root.join("sibling")).unwrap();
    let folders = Symlinks::Folders(vec![rig.dir.path().join("storage")]);
    for (path, follow, within, listed) in [
        ("/real/a.txt", true, true, true),
        ("/relative", true, true, true),
        ("/absolute", true, true, true),
        ("/escape", true, false, false),
        ("/folder/secret", true, false, false),
        ("/storage/s.txt", true, false, true),
        ("/sibling", true, false, false),
    ] {
        assert_eq!(rig.found(path, &Symlinks::Follow), follow, "{path} follow");
        assert_eq!(rig.found(path, &Symlinks::Within), within, "{path} within");
        assert_eq!(rig.found(path, &folders), listed, "{path} folders");
    }
    // A root that is itself a link, as a release folder's `current`.
    fs::rename(&root, rig.dir.path().join("release")).unwrap();
    symlink("release", &root).unwrap();
    assert!(rig.found("/real/a.txt", &Symlinks::Within) && rig.found("/relative", &Symlinks::Within));
    assert!(!rig.found("/escape", &Symlinks::Within));
}

#[test]
fn directories() {
    let rig = Rig::new(FileLimits::default());
    rig.write("dir/index.html", "<p>");
    rig.write("app/index.php", "<?php");
    rig.write("empty/x", "");
    let ask = |path: &str, index: Vec<Index>| {
        let steps = vec![file(path.trim_end_matches('/')), Step::Directory { path: path.as_bytes().to_vec(), index }];
        rig.serve(Method::GET, &[], &Symlinks::Within, steps).unwrap()
    };
    let html = || vec![Index::File("index.html".into())];
    let php = |name: &str, must_exist| vec![Index::Script { name: name.into(), must_exist }];
    let Served::Response(page) = ask("/dir/", html()) else { panic!() };
    assert_eq!(header(&page, "content-type"), "text/html; charset=utf-8");
    let Served::Response(redirect) = ask("/dir", html()) else { panic!() };
    // The rig's path: what a browser would take for `//` is written as what it is.
    assert_eq!((redirect.status().as_u16(), header(&redirect, "location")), (301, "/dir%5Cx/?q=1"));
    assert!(matches!(ask("/empty/", html()), Served::NotFound));
    assert!(matches!(ask("/empty", html()), Served::NotFound));
    assert!(matches!(ask("/none", html()), Served::NotFound));
    assert!(matches!(ask("/app/", php("/app/index.php", true)), Served::Script(script) if script.name == "/app/index.php"));
    assert!(matches!(ask("/app", php("/app/index.php", true)), Served::Response(_)));
    assert!(matches!(ask("/empty/", php("/empty/index.php", true)), Served::NotFound));
    assert!(matches!(ask("/empty", php("/empty/index.php", false)), Served::Response(_)));
    assert!(matches!(ask("/none", php("/none/index.php", false)), Served::NotFound));
}

#[test]
fn what_may_not_be_read_is_403_and_a_script_that_may_not_still_runs() {
    let rig = Rig::new(FileLimits::default());
    let path = rig.write("secret.php", "x");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read(&path).is_ok() {
        return; // root reads everything
    }
    let forbidden = rig.serve(Method::GET, &[], &Symlinks::Follow, vec![file("/secret.php")]);
    assert_eq!(forbidden.unwrap_err().kind, Kind::Forbidden);
    let runs = rig.serve(Method::GET, &[], &Symlinks::Follow, vec![Step::Script("/secret.php".into())]);
    assert!(matches!(runs, Ok(Served::Script(_))));
}

#[test]
fn what_exists_is_known_for_the_hint() {
    let rig = Rig::new(FileLimits::default());
    rig.write("x.php", "");
    let exists = |path: &str| rig.worker.block_on(rig.files.exists(&rig.root(), &Symlinks::Follow, path.as_bytes()));
    assert!(exists("/x.php") && !exists("/y.php") && !exists("/"));
}

#[test]
fn dates_that_no_calendar_has_do_not_panic() {
    assert_eq!(http_date(i64::MIN), "Thu, 01 Jan 1970 00:00:00 GMT");
    assert_eq!(http_date(i64::MAX), "Fri, 31 Dec 9999 23:59:59 GMT");
    assert_eq!(etag(612, 0x5d8c_72a5), "\"5d8c72a5-264\"");
    assert_eq!(content_type(b"/x"), "application/octet-stream");
    assert_eq!(content_type(b"/\xff.svg"), "image/svg+xml; charset=utf-8");
    assert_eq!(content_type(b"/a.d/x"), "application/octet-stream");
}

/// However many paths are asked for, and whatever they hold.
#[test]
fn what_is_kept_is_bounded() {
    let cache_bytes = 256 << 10;
    let rig = Rig::new(FileLimits { cache_bytes, ..FileLimits::default() });
    for nth in 0..200 {
        rig.write(&format!("{nth}.bin"), pattern(8000));
        assert_eq!(rig.get(&format!("/{nth}.bin"), &[]).status(), 200);
        assert!(!rig.found(&format!("/none-{nth}"), &Symlinks::Follow));
        assert!(rig.files.stats.bytes() <= cache_bytes, "{} bytes", rig.files.stats.bytes());
    }
    assert!(rig.files.stats.bytes() > cache_bytes / 2);
    // One that is too large for a part of it is served all the same.
    rig.write("large.bin", pattern(60_000));
    for _ in 0..2 {
        let response = rig.get("/large.bin", &[]);
        assert_eq!(rig.body(response), pattern(60_000));
    }
}

/// One path under two policies, and in two roots, is two questions.
#[test]
fn what_is_known_of_a_path_is_known_of_that_path() {
    let rig = Rig::new(FileLimits::default());
    rig.write("a.css", "root");
    rig.write("sub/a.css", "sub");
    let outside = rig.dir.path().join("outside.css");
    fs::write(&outside, "outside").unwrap();
    symlink(&outside, rig.root().join("link.css")).unwrap();
    for _ in 0..2 {
        assert!(rig.found("/link.css", &Symlinks::Follow) && !rig.found("/link.css", &Symlinks::Within));
        let response = rig.get("/sub/a.css", &[]);
        assert_eq!(rig.body(response), b"sub");
        let response = rig.get("/a.css", &[]);
        assert_eq!(rig.body(response), b"root");
    }
    // A change of mode is one of the file's inode; root may read anything, so it is asked of a look alone.
    assert!(
        matches!(rig.serve(Method::POST, &[], &Symlinks::Follow, vec![file("/a.css")]), Ok(Served::Response(r)) if r.status() == 405)
    );
    assert_eq!(rig.get("/a.css", &[(RANGE, "bytes=1-2")]).status(), 206);
}
