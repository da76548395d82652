//! The PROXY protocol, versions 1 and 2, as a load balancer sends it before anything else (HAProxy, "The PROXY protocol", 2020).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::io::{AsyncRead, AsyncReadExt};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Of version 1, with its line break.
const MAX_LINE: usize = 107;
/// Of version 2 after its first 16 bytes: addresses and TLVs. The specification allows more; nobody sends it.
const MAX_BLOCK: usize = 4096;

/// Client and server as the client sees them; `None`: the proxy's own connection, as for its health checks.
pub type Ends = Option<(SocketAddr, SocketAddr)>;

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("PROXY header: {what}"))
}

/// Reads the header and not a byte more. The caller sets the deadline.
///
/// # Errors
/// What was read is no header: the connection is to be closed without an answer.
pub async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Ends> {
    // The shortest line of version 1 is longer than that.
    let mut start = [0; 12];
    stream.read_exact(&mut start).await?;
    if &start == SIGNATURE {
        return version_2(stream).await;
    }
    if !start.starts_with(b"PROXY ") {
        return Err(malformed("there is none"));
    }
    let mut line = start.to_vec();
    while !line.ends_with(b"\n") {
        if line.len() >= MAX_LINE {
            return Err(malformed("a line that does not end"));
        }
        line.push(stream.read_u8().await?);
    }
    version_1(&line)
}

fn version_1(line: &[u8]) -> io::Result<Ends> {
    let line = line.strip_suffix(b"\r\n").and_then(|line| str::from_utf8(line).ok()).ok_or_else(|| malformed("not a line"))?;
    let mut words = line.split(' ');
    let (_, family) = (words.next(), words.next());
    if family == Some("UNKNOWN") {
        return Ok(None);
    }
    let all: Vec<&str> = words.collect();
    let [source, destination, source_port, destination_port] = all.as_slice() else { return Err(malformed("not four values")) };
    let address = |text: &str| -> io::Result<IpAddr> {
        match family {
            Some("TCP4") => text.parse::<Ipv4Addr>().map(IpAddr::from).map_err(|_| malformed("no IPv4 address")),
            Some("TCP6") => text.parse::<Ipv6Addr>().map(IpAddr::from).map_err(|_| malformed("no IPv6 address")),
            _ => Err(malformed("an unknown family")),
        }
    };
    // `parse` would take a sign and leading zeros.
    let port = |text: &str| {
        let fine = text == "0" || (!text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit()));
        fine.then(|| text.parse::<u16>().ok()).flatten().ok_or_else(|| malformed("no port"))
    };
    Ok(Some(((address(source)?, port(source_port)?).into(), (address(destination)?, port(destination_port)?).into())))
}

async fn version_2<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Ends> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let [version_and_command, family, high, low] = head;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if version_and_command >> 4 != 2 {
        return Err(malformed("an unknown version"));
    }
    if length > MAX_BLOCK {
        return Err(malformed("too long"));
    }
    let mut block = vec![0; length];
    stream.read_exact(&mut block).await?;
    match version_and_command & 15 {
        // LOCAL: whatever follows is to be passed over.
        0 => Ok(None),
        1 => addresses(family, &block),
        _ => Err(malformed("an unknown command")),
    }
}

/// TLVs behind the addresses are passed over.
fn addresses(family: u8, block: &[u8]) -> io::Result<Ends> {
    let short = || malformed("shorter than its addresses");
    let port = |at: usize| Some(u16::from_be_bytes(block.get(at..at + 2)?.try_into().ok()?));
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(block.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(block.get(at..at + 16)?).ok()?));
    let ends = match family {
        0x11 => (|| Some(((v4(0)?, port(8)?).into(), (v4(4)?, port(10)?).into())))(),
        0x21 => (|| Some(((v6(0)?, port(32)?).into(), (v6(16)?, port(34)?).into())))(),
        // UNSPEC, datagrams and unix sockets: nothing that could be a client's address here.
        _ => return Ok(None),
    };
    ends.map(Some).ok_or_else(short)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::{io::AsyncWriteExt, net::TcpStream};

    use super::*;

    /// What `read` makes of the bytes, and what it leaves.
    async fn given(bytes: &[u8]) -> (io::Result<Ends>, Vec<u8>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let ends = read(&mut server).await;
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        (ends, rest)
    }

    fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap().to_be_bytes();
        [SIGNATURE.as_slice(), &[0x20 | command, family], &length, block].concat()
    }

    #[tokio::test]
    async fn both_versions_and_not_a_byte_more() {
        let four = Some(("192.0.2.1:50000".parse().unwrap(), "10.0.0.1:443".parse().unwrap()));
        let six = Some(("[2001:db8::1]:50000".parse().unwrap(), "[2001:db8::2]:443".parse().unwrap()));
        let block4 = [192, 0, 2, 1, 10, 0, 0, 1, 0xc3, 0x50, 1, 0xbb];
        let mut block6 = [0; 36];
        (block6[0], block6[1], block6[2], block6[3], block6[15]) = (0x20, 1, 0x0d, 0xb8, 1);
        (block6[16], block6[17], block6[18], block6[19], block6[31]) = (0x20, 1, 0x0d, 0xb8, 2);
        (block6[32], block6[33], block6[34], block6[35]) = (0xc3, 0x50, 1, 0xbb);
        let with_tlv = [block4.as_slice(), &[0x04, 0, 3, 1, 2, 3]].concat();
        for (header, ends) in [
            (b"PROXY TCP4 192.0.2.1 10.0.0.1 50000 443\r\n".to_vec(), four),
            (b"PROXY TCP6 2001:db8::1 2001:db8::2 50000 443\r\n".to_vec(), six),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN ffff:f:f whatever\r\n".to_vec(), None),
            (v2(1, 0x11, &block4), four),
            (v2(1, 0x11, &with_tlv), four),
            (v2(1, 0x21, &block6), six),
            (v2(0, 0x11, &block4), None),
            (v2(0, 0, b""), None),
            (v2(1, 0x31, &[0; 216]), None),
        ] {
            let (seen, rest) = given(&[header.as_slice(), b"GET / HTTP/1.1"].concat()).await;
            assert_eq!((seen.unwrap(), rest.as_slice()), (ends, b"GET / HTTP/1.1".as_slice()), "{}", header.escape_ascii());
        }
        for wrong in [
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 10.0.0.1 50000\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 10.0.0.1 +5 443\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 10.0.0.1 70000 443\r\n".to_vec(),
            b"PROXY TCP4 2001:db8::1 10.0.0.1 50000 443\r\n".to_vec(),
            b"PROXY UDP4 192.0.2.1 10.0.0.1 50000 443\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 10.0.0.1 50000 443\n".to_vec(),
            [b"PROXY TCP4 ".as_slice(), &[b'1'; 200]].concat(),
            v2(2, 0x11, &block4),
            v2(1, 0x11, &block4[..11]),
            v2(1, 0x11, &[0; MAX_BLOCK + 1]),
            v2(1, 0x11, &block4)[..20].to_vec(),
            b"PROXY".to_vec(),
        ] {
            let (seen, _) = given(&wrong).await;
            assert!(seen.is_err(), "{}: {seen:?}", wrong.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(line in prop::collection::vec(any::<u8>(), 0..120), family in any::<u8>(), block in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = version_1(&line);
            let _ = addresses(family, &block);
        }
    }
}
