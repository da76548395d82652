//! Every key there is. A test holds this list against what is read, documented and changed by each key.

type Keys = &'static [(&'static str, &'static [&'static str])];

/// The keys of this version, by the table they belong to; "" is the top of the file.
pub const KEYS: Keys = &[
    ("", &["workers", "include", "reload", "state", "listen", "buffer", "log", "drain", "upstream", "site"]),
    (
        "listen",
        &[
            "http",
            "https",
            "ops",
            "ops_allow",
            "admin",
            "health_path",
            "proxy_protocol",
            "trusted_proxies",
            "idle_timeout",
            "header_timeout",
            "max_uri_bytes",
            "max_header_bytes",
            "stall_timeout",
            "min_rate",
            "max_connections",
            "max_connections_per_address",
            "max_requests_per_connection",
        ],
    ),
    ("buffer", &["memory", "total", "dir", "disk"]),
    ("log", &["format", "level", "access", "access_file"]),
    ("drain", &["grace", "lame_duck", "health_fail_delay", "quiet", "margin", "receipt"]),
    (
        "upstream",
        &[
            "active",
            "keepalive",
            "lease",
            "workers_per_endpoint",
            "connect_timeout",
            "read_timeout",
            "retries",
            "balance",
            "queue",
            "set",
        ],
    ),
    ("lease", &["requests", "age", "idle"]),
    ("queue", &["max", "timeout"]),
    ("set", &["endpoints", "root", "php_root", "min_ready", "status_path", "status_listen", "ping"]),
    ("ping", &["path", "every", "fall", "rise"]),
    (
        "site",
        &[
            "hosts",
            "root",
            "php_root",
            "index",
            "scripts",
            "front",
            "symlinks",
            "route",
            "files",
            "try_files",
            "script",
            "upstream",
            "read_timeout",
            "body_limit",
            "params",
            "access_log",
        ],
    ),
    ("route", &["path", "when", "files", "try_files", "script", "upstream", "read_timeout", "body_limit", "params", "access_log"]),
    ("when", &["method"]),
];

const ROUTE_LATER: &[&str] = &[
    "redirect",
    "rewrite",
    "respond",
    "headers",
    "request_headers",
    "expires",
    "allow",
    "deny",
    "basic_auth",
    "limit",
    "error_page",
    "internal",
    "compress",
    "lane",
    "lanes",
];

/// Keys of the design that this version refuses: silently doing without a `deny` would be worse than not starting.
pub const LATER: Keys = &[
    ("", &["tls", "kubernetes"]),
    ("upstream", &["active_from", "assets_fallback", "lane", "lanes"]),
    ("set", &["kubernetes", "preflight"]),
    ("site", ROUTE_LATER),
    ("route", ROUTE_LATER),
    ("when", &["header", "cookie", "from"]),
];
