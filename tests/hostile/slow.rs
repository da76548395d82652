//! Clients that take their time, and many of them.

use std::{
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use crate::{
    case::{PATIENCE, toml},
    support::{
        gate::within,
        http::{self, Connection, request},
        process::Slackwater,
        scripted_fpm::{Behaviour, ScriptedFpm},
    },
};

/// Sends byte by byte, with a pause before each, until the peer has had enough. Gives what it answers with.
async fn trickle(client: &mut Connection<tokio::net::TcpStream>, bytes: &[u8], pause: Duration) -> String {
    for byte in bytes {
        tokio::time::sleep(pause).await;
        if client.peer_has_closed() || client.has_unasked_bytes() || client.send([*byte]).await.is_err() {
            break;
        }
    }
    let answer = within(PATIENCE, "an end", client.read_to_end()).await;
    answer.map(|bytes| String::from_utf8_lossy(&bytes).lines().next().unwrap_or_default().to_owned()).unwrap_or_default()
}

/// A deadline is one for the whole: whoever sends a byte now and then does not move it.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_by_the_byte_has_the_deadline_of_a_head() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "header_timeout = \"1s\"", "")).await;
    let began = Instant::now();
    let mut client = Connection::open(proxy.http()).await.unwrap();
    let head = request("GET", "/a.php", &[("X-Long", &"a".repeat(1000))], b"");
    let answer = trickle(&mut client, &head, Duration::from_millis(50)).await;
    let took = began.elapsed();
    assert_eq!(answer, "HTTP/1.1 408 Request Timeout");
    assert!(took < Duration::from_secs(10), "{took:?}");
    println!("header_timeout of 1 s: ended after {took:?}");
    assert!(fpm.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_idle_connections_from_one_address_leaves_room_for_the_others() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let listen = "max_connections = 60\nmax_connections_per_address = 40";
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), listen, "")).await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        let Ok(client) = Connection::open(proxy.http()).await else { break };
        idle.push(client);
    }
    // From another address of this machine.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
    let stream = within(PATIENCE, "a connection", socket.connect(proxy.http())).await.unwrap();
    let mut other = Connection::over(stream);
    let answer = within(PATIENCE, "an answer", other.exchange("GET", &request("GET", "/a.php", &[], b""))).await.unwrap();
    assert_eq!(answer.status, 200);
    drop(idle);
}

/// What would take a backtracking engine longer than the universe has been there.
#[tokio::test(flavor = "multi_thread")]
async fn an_expression_of_a_route_takes_linear_time() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let routes = "[[site.route]]\npath = '~^/(a+)+$'\nrespond = { status = 403 }\n\
                  [[site.route]]\npath = '~^/(a|a)*b(.*)(.*)(.*)c$'\nrespond = { status = 403 }\n";
    let proxy = Slackwater::start(&(toml(&fpm.address().to_string(), "", "") + routes)).await;
    let target = format!("/{}!", "a".repeat(15_000));
    let began = Instant::now();
    assert_eq!(within(PATIENCE, "an answer", http::get(proxy.http(), &target)).await.unwrap().status, 200);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    println!("15,000 bytes through two hostile expressions: {took:?}");
}

/// Orders are for this process's user and root, and nobody keeps the others from giving theirs.
#[tokio::test(flavor = "multi_thread")]
async fn the_admin_socket_is_its_users_alone_and_cannot_be_occupied() {
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "")).await;
    assert_eq!(std::fs::metadata(proxy.admin()).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stuck = Vec::new();
    for _ in 0..64 {
        let mut client = Connection::open_unix(proxy.admin()).await.unwrap();
        client.send("POST /swap HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{").await.unwrap();
        stuck.push(client);
    }
    let began = Instant::now();
    proxy.cli_ok(&["status", "--json"]).await;
    let took = began.elapsed();
    println!("64 orders that do not come whole: the next one waited {took:?}");
    // What is no order.
    for send in ["GET / HTTP/1.1\r\n\r\n", "\0\0\0\0", "POST /swap HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"] {
        let mut client = Connection::open_unix(proxy.admin()).await.unwrap();
        client.send(send).await.unwrap();
        let answer = within(PATIENCE, "an answer", client.read_response("GET")).await;
        assert!(answer.is_err() || answer.as_ref().is_ok_and(|answer| answer.status >= 400), "{answer:?}");
    }
    assert_eq!(http::get(proxy.http(), "/a.php").await.unwrap().status, 200);
}

/// Also somebody who may write to the socket's folder cannot order: root here, so that another user is to be had.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_is_refused_on_the_admin_socket_whatever_its_mode() {
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        panic!("this test wants root, as tests/run does: it becomes another user");
    }
    let fpm = ScriptedFpm::start(Behaviour::hello("blue")).await;
    let mut proxy = Slackwater::start(&toml(&fpm.address().to_string(), "", "")).await;
    for path in [proxy.folder(), proxy.admin()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let admin = proxy.admin().display().to_string();
    let output = tokio::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "perl", "-MIO::Socket::UNIX", "-e"])
        .arg(
            "$SIG{PIPE} = 'IGNORE'; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die; \
             print $s \"POST /drain HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 0\\r\\n\\r\\n\"; $s->flush; my $l = <$s>; print defined $l ? $l : \"nothing\\n\";",
        )
        .arg(&admin)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.trim(), "nothing", "{}", String::from_utf8_lossy(&output.stderr));
    assert!(proxy.is_running());
    proxy.wait_for_log("refused on the admin socket", PATIENCE).await;
    assert_eq!(proxy.status().await["phase"], "Running");
}
