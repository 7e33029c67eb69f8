//! As much of HTTP/1.1 as the peers speak, with bodies that can be checked.

use std::io::{self, BufRead, Read, Write};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

/// Longest request or response head.
const HEAD_MAX: u64 = 16 * 1024;

/// The first line and what a head says about the body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// Request or status line.
    pub line: String,
    /// Length of the body.
    pub length: u64,
    /// The connection ends after this message.
    pub close: bool,
    /// The cookie that a response sets, name and value.
    pub cookie: Option<String>,
}

/// Reads a head; `None` when the peer closed instead.
pub fn read_head(stream: &mut impl BufRead) -> Result<Option<Head>> {
    let mut head = Head { line: String::new(), length: 0, close: false, cookie: None };
    let mut stream = stream.take(HEAD_MAX);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            if head.line.is_empty() {
                return Ok(None);
            }
            bail!("the connection ended inside a head that begins with {:?}", head.line);
        }
        let line = line.trim_end();
        if head.line.is_empty() {
            head.line = line.to_owned();
        } else if line.is_empty() {
            return Ok(Some(head));
        } else if let Some((name, value)) = line.split_once(':') {
            if name.eq_ignore_ascii_case("content-length") {
                head.length = value.trim().parse().context("Content-Length is no number")?;
            } else if name.eq_ignore_ascii_case("set-cookie") {
                head.cookie = value.split(';').next().map(|pair| pair.trim().to_owned());
            } else if name.eq_ignore_ascii_case("connection") {
                head.close = value.trim().eq_ignore_ascii_case("close");
            }
        }
    }
}

/// Sends a request without a body and reads the response's body as text.
pub fn get(stream: &mut (impl BufRead + Write), path: &str) -> Result<String> {
    request(stream, "GET", path, 0)?;
    let length = response(stream)?;
    let mut body = String::new();
    stream.take(length).read_to_string(&mut body).context("reading the response's body")?;
    Ok(body)
}

/// Downloads a body of `length` bytes and checks that it is [`Noise`].
pub fn download(stream: &mut (impl BufRead + Write), length: u64) -> Result<()> {
    request(stream, "GET", &format!("/bytes/{length}"), 0)?;
    if response(stream)? != length {
        bail!("asked for {length} bytes, offered another number");
    }
    let got = hash(stream, length)?;
    let expected = hash(&mut Noise::default(), length)?;
    if got != expected {
        bail!("{length} bytes arrived with sha256 {got} instead of {expected}");
    }
    Ok(())
}

/// Uploads `length` bytes and checks the sum that the server answers with.
pub fn upload(stream: &mut (impl BufRead + Write), length: u64) -> Result<()> {
    request(stream, "POST", "/upload", length)?;
    io::copy(&mut Noise::default().take(length), stream).context("sending the request's body")?;
    stream.flush()?;
    let length_of_answer = response(stream)?;
    let mut got = String::new();
    stream.take(length_of_answer).read_to_string(&mut got).context("reading the sum")?;
    let expected = hash(&mut Noise::default(), length)?;
    if got != expected {
        bail!("{length} bytes were received with sha256 {got} instead of {expected}");
    }
    Ok(())
}

/// SHA-256 of exactly `length` bytes of a stream, in hexadecimal.
pub fn hash(stream: &mut impl Read, length: u64) -> Result<String> {
    let mut sum = Sha256::new();
    let copied = io::copy(&mut stream.take(length), &mut sum).context("reading a body")?;
    if copied != length {
        bail!("the body ended after {copied} of {length} bytes");
    }
    Ok(sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Bytes that repeat nowhere, so that an exchange or a repetition of segments changes their sum.
#[derive(Debug)]
pub struct Noise {
    state: u64,
}

impl Default for Noise {
    fn default() -> Self {
        Self { state: 0x9e37_79b9_7f4a_7c15 }
    }
}

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Whole words only, so that the bytes do not depend on how they are asked for.
        let whole = buffer.len() / 8 * 8;
        if whole == 0 {
            let Some(first) = buffer.first_mut() else { return Ok(0) };
            // Only at the end of a body.
            *first = self.next().to_le_bytes()[0];
            return Ok(1);
        }
        for chunk in buffer[..whole].chunks_exact_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes());
        }
        Ok(whole)
    }
}

impl Noise {
    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }
}

fn request(stream: &mut impl Write, method: &str, path: &str, length: u64) -> Result<()> {
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: service.test\r\nContent-Length: {length}\r\n\r\n")
        .and_then(|()| stream.flush())
        .with_context(|| format!("sending {method} {path}"))
}

/// Reads the head of a good response; the length of its body.
fn response(stream: &mut impl BufRead) -> Result<u64> {
    let head = read_head(stream).context("reading the response")?.context("closed instead of a response")?;
    if !head.line.starts_with("HTTP/1.1 200") {
        bail!("the response is {:?}", head.line);
    }
    Ok(head.length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_whatever_the_case() {
        let mut text =
            "GET / HTTP/1.1\r\nHOST: a\r\ncontent-LENGTH: 7\r\nConnection: Close\r\n\r\nrest".as_bytes();
        let head = read_head(&mut text).expect("well formed").expect("not empty");
        assert_eq!(head, Head { line: "GET / HTTP/1.1".into(), length: 7, close: true, cookie: None });
        assert_eq!(text, b"rest");
        assert!(read_head(&mut "".as_bytes()).expect("an end is no error").is_none());
        assert!(read_head(&mut "GET".as_bytes()).is_err());
    }

    #[test]
    fn noise_is_the_same_however_it_is_read() {
        let mut whole = vec![0; 1003];
        Noise::default().read_exact(&mut whole).expect("endless");
        assert_eq!(hash(&mut whole.as_slice(), 1003).ok(), hash(&mut Noise::default(), 1003).ok());
        assert_ne!(whole[..8], whole[8..16]);
        assert!(hash(&mut &whole[..1002], 1003).is_err());
    }
}
