//! Header fields of HTTP/1.x (RFC 9112): one cookie's value in a request or a response.
//!
//! An automaton of one table look-up a byte, so that a program without branches can walk it: what the
//! kernel's verifier follows does not grow with what a header may hold. [`automaton`] makes the table for
//! a cookie's name, [`Reader`] is the walk. [`Head`] has the fields themselves, for tools on the host.
//!
//! A cookie's value is a secret of its user. It is never kept: it is known by a hash of 128 bits.

use crate::opaque::opaque;

/// Bytes of an automaton: the next state by state and byte.
pub const TABLE: usize = 1 << 16;

/// A request begins.
pub const REQUEST: u8 = 0;
/// A response begins.
pub const RESPONSE: u8 = 1;
/// A field line of a response is passed over; after a cookie, how to go on to the next one.
pub const RESPONSE_SKIP: u8 = 2;

/// A NUL, which no header has, came in the value: padding, see [`Reader::step`].
pub const PAUSED: u8 = 250;
/// The byte was one of the value.
pub const VALUE: u8 = 251;
/// The header has ended.
pub const END: u8 = 252;
/// This is not HTTP.
pub const NOT_HTTP: u8 = 253;
/// The byte ended the value.
pub const FOUND: u8 = 254;

/// Longest name of a cookie.
pub const NAME_MAX: usize = 64;

/// True for a name that a cookie can have: a token (RFC 9110 section 5.6.2) of 1 to 64 characters.
#[must_use]
pub fn is_cookie_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(is_token)
}

fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// Reads a header byte by byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reader {
    /// State of the automaton.
    pub state: u8,
    /// Bytes up to the one that ended it, that one not counted.
    pub at: u32,
    /// Hash of the value so far.
    pub hash: [u64; 2],
}

/// The hash of nothing.
pub const SEEDS: [u64; 2] = [0x6a09_e667_f3bc_c908, 0xbb67_ae85_84ca_a73b];
const FACTORS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93];

impl Reader {
    /// At the start of a request or response, or of what follows a cookie in one.
    #[inline(always)]
    #[must_use]
    pub const fn new(state: u8) -> Self {
        Self { state, at: 0, hash: SEEDS }
    }

    /// True when no byte will change the state.
    #[inline(always)]
    #[must_use]
    pub const fn ended(&self) -> bool {
        self.state >= END
    }

    /// Takes the next byte, without a branch. A NUL changes nothing, but at the start of a request.
    #[inline(always)]
    pub fn step(&mut self, table: &[u8; TABLE], byte: u8) {
        let at = (self.state as usize) << 8 | byte as usize;
        // SAFETY: two bytes are an index below `TABLE`.
        self.state = unsafe { *table.as_ptr().add(at) };
        // 1 while it goes on, and when the byte is one of the value. (Factors, not masks: the verifier of
        // kernel 6.18 follows both ways of a mask that is all ones or nothing.)
        let state = opaque(self.state as u64);
        self.at = self.at.wrapping_add((state.wrapping_sub(END as u64) >> 63) as u32);
        let value = opaque((state ^ VALUE as u64).wrapping_sub(1) >> 63);
        self.hash = mix(self.hash, byte, value);
    }
}

/// Adds a byte to a hash, where `value` is 1; where it is 0 the hash stays.
#[inline(always)]
const fn mix(hash: [u64; 2], byte: u8, value: u64) -> [u64; 2] {
    let byte = byte as u64 * value;
    let [a, b] = hash;
    let a = (a ^ byte).wrapping_mul((FACTORS[0] - 1).wrapping_mul(value) + 1);
    let b = b.wrapping_add(byte).wrapping_mul((FACTORS[1] - 1).wrapping_mul(value) + 1);
    [a, b ^ (b >> 29).wrapping_mul(value)]
}

/// The hash by which a cookie's value is known, as a session's identifier.
#[must_use]
pub fn cookie_id(value: &[u8]) -> [u8; 16] {
    id(value.iter().fold(SEEDS, |hash, byte| mix(hash, *byte, 1)))
}

/// A hash as bytes.
#[inline(always)]
#[must_use]
pub fn id(hash: [u64; 2]) -> [u8; 16] {
    let [a, b] = hash;
    (a as u128 | (b as u128) << 64).to_le_bytes()
}

/// Writes the automaton for a cookie's name, of which [`is_cookie_name`] must be true.
///
/// Names of fields are compared without regard to case, the cookie's with. Of several cookies with the
/// name a request's first counts. A value ends before a semicolon or a blank; an empty one is none. A
/// response with a status of 1xx is followed by another one.
pub fn automaton(name: &str, table: &mut [u8; TABLE]) {
    let mut states = States { table, next: RESPONSE_SKIP + 1 };
    for state in [END, NOT_HTTP, FOUND] {
        states.all(state, state);
    }
    states.value();
    states.request(name.as_bytes());
    states.response(name.as_bytes());
}

/// The name that an automaton was made for, or `None` when it is none that [`automaton`] makes today: `again`
/// is where it is made once more, to compare.
#[must_use]
pub fn name_of<'n>(
    table: &[u8; TABLE],
    again: &mut [u8; TABLE],
    name: &'n mut [u8; NAME_MAX],
) -> Option<&'n str> {
    let next = |state: u8, byte: u8| table.get((state as usize) << 8 | byte as usize).copied();
    // Where the pairs of a request begin; from there only the name's letters lead anywhere.
    let mut state = b"GET \ncookie:".iter().try_fold(REQUEST, |state, byte| next(state, *byte))?;
    let other = next(state, 1)?;
    let mut len = 0;
    for place in name.iter_mut() {
        let Some(letter) = (b'!'..=b'~').find(|b| is_token(*b) && next(state, *b) != Some(other)) else {
            break;
        };
        *place = letter;
        state = next(state, letter)?;
        len += 1;
    }
    let name = core::str::from_utf8(name.get(..len)?).ok().filter(|name| is_cookie_name(name))?;
    again.fill(0);
    automaton(name, again);
    (again == table).then_some(name)
}

struct States<'t> {
    table: &'t mut [u8; TABLE],
    next: u8,
}

impl States<'_> {
    fn new_state(&mut self) -> u8 {
        let state = self.next;
        debug_assert!(state < PAUSED, "a name of {NAME_MAX} characters leaves states over");
        self.next += 1;
        state
    }

    fn on(&mut self, state: u8, byte: u8, next: u8) {
        if let Some(cell) = self.table.get_mut((state as usize) << 8 | byte as usize) {
            *cell = next;
        }
    }

    fn any_case(&mut self, state: u8, byte: u8, next: u8) {
        self.on(state, byte.to_ascii_lowercase(), next);
        self.on(state, byte.to_ascii_uppercase(), next);
    }

    /// Whatever comes leads to `next`, but a NUL nowhere.
    fn all(&mut self, state: u8, next: u8) {
        for byte in 1..=255 {
            self.on(state, byte, next);
        }
        self.on(state, 0, state);
    }

    /// As `like` does, where nothing else is said. A NUL leads nowhere.
    fn copy(&mut self, state: u8, like: u8) {
        let from = (like as usize) << 8;
        self.table.copy_within(from..from + 256, (state as usize) << 8);
        self.on(state, 0, state);
    }

    /// Letters one after the other from `state` on; what does not fit goes on as from `other`.
    fn word(&mut self, mut state: u8, word: &[u8], other: u8, any_case: bool) -> u8 {
        for byte in word {
            let next = self.new_state();
            self.copy(next, other);
            if any_case {
                self.any_case(state, *byte, next);
            } else {
                self.on(state, *byte, next);
            }
            state = next;
        }
        state
    }

    fn value(&mut self) {
        self.all(VALUE, VALUE);
        for end in *b"; \t\r\n" {
            self.on(VALUE, end, FOUND);
        }
        self.copy(PAUSED, VALUE);
        self.on(VALUE, 0, PAUSED);
    }

    /// After the name: `=` and a value, which must have a byte.
    fn equals(&mut self, state: u8, other: u8) {
        let equals = self.new_state();
        self.on(state, b'=', equals);
        self.all(equals, VALUE);
        for blank in *b" \t" {
            self.on(equals, blank, equals);
        }
        for end in *b";\r\n" {
            let next = self.after(other, end);
            self.on(equals, end, next);
        }
    }

    /// Where a byte leads.
    fn after(&self, state: u8, byte: u8) -> u8 {
        self.table.get((state as usize) << 8 | byte as usize).copied().unwrap_or(NOT_HTTP)
    }

    /// Lines that are passed over until an empty one, which leads to `end`. Returns the start of a line,
    /// `skip` is within one.
    fn lines(&mut self, skip: u8, end: u8) -> u8 {
        let (line, cr) = (self.new_state(), self.new_state());
        self.all(skip, skip);
        self.on(skip, b'\n', line);
        for state in [line, cr] {
            self.copy(state, skip);
            self.on(state, b'\n', end);
        }
        self.on(line, b'\r', cr);
        line
    }

    fn request(&mut self, name: &[u8]) {
        // The method, a word of capitals, tells HTTP from other protocols.
        let method = self.new_state();
        let empty = self.new_state();
        for state in [REQUEST, empty, method] {
            self.all(state, NOT_HTTP);
            for letter in b'A'..=b'Z' {
                self.on(state, letter, method);
            }
        }
        self.on(REQUEST, 0, NOT_HTTP);
        // Empty lines before a request are passed over (RFC 9112 section 2.2).
        for end in *b"\r\n" {
            self.on(REQUEST, end, empty);
            self.on(empty, end, empty);
        }
        self.on(method, b'-', method);
        let skip = self.new_state();
        let line = self.lines(skip, END);
        self.on(method, b' ', skip);
        // Every pair begins after the colon or a semicolon.
        let pairs = self.word(line, b"cookie:", skip, true);
        let other = self.new_state();
        for state in [pairs, other] {
            self.all(state, other);
            self.on(state, b';', pairs);
            self.on(state, b'\n', line);
        }
        for blank in *b" \t" {
            self.on(pairs, blank, pairs);
        }
        let named = self.word(pairs, name, other, false);
        self.equals(named, other);
    }

    fn response(&mut self, name: &[u8]) {
        self.all(RESPONSE, NOT_HTTP);
        let version = self.word(RESPONSE, b"HTTP/", NOT_HTTP, false);
        self.all(version, version);
        self.on(version, b'\n', NOT_HTTP);
        let code = self.new_state();
        self.on(version, b' ', code);
        let line = self.lines(RESPONSE_SKIP, END);
        self.copy(code, RESPONSE_SKIP);
        self.on(code, b' ', code);
        let informational = self.new_state();
        self.lines(informational, RESPONSE);
        self.on(code, b'1', informational);
        let field = self.word(line, b"set-cookie:", RESPONSE_SKIP, true);
        for blank in *b" \t" {
            self.on(field, blank, field);
        }
        let named = self.word(field, name, RESPONSE_SKIP, false);
        self.equals(named, RESPONSE_SKIP);
    }
}

/// The head of a request as slices, for the host: what the data path only walks over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head<'b> {
    /// What is there of the field lines, up to the empty line.
    lines: &'b [u8],
    /// The empty line is there.
    whole: bool,
}

impl<'b> Head<'b> {
    /// The head with which a client's bytes begin, as far as it is there. `None` for what is not HTTP/1, and
    /// before the method is whole.
    ///
    /// Empty lines before the request line are passed over (RFC 9112 section 2.2).
    #[must_use]
    pub fn of_request(bytes: &'b [u8]) -> Option<Self> {
        let start = bytes.iter().position(|byte| !b"\r\n".contains(byte))?;
        let bytes = bytes.get(start..)?;
        let (method, _) = bytes.split_at_checked(bytes.iter().position(|byte| *byte == b' ')?)?;
        let capital = |byte: &u8| byte.is_ascii_uppercase();
        if !method.first().is_some_and(capital) || !method.iter().all(|byte| capital(byte) || *byte == b'-') {
            return None;
        }
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
            return Some(Self { lines: &[], whole: false });
        };
        let (request, lines) = bytes.split_at_checked(end + 1)?;
        if !request.windows(8).any(|part| part == b" HTTP/1.") {
            return None;
        }
        let mut len = 0;
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            if matches!(line, b"\n" | b"\r\n") {
                return Some(Self { lines: lines.get(..len)?, whole: true });
            }
            len += line.len();
        }
        Some(Self { lines, whole: false })
    }

    /// True when the head has ended.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.whole
    }

    /// Names and values of the fields whose lines are whole, without the blanks around a value.
    pub fn fields(&self) -> impl Iterator<Item = (&'b [u8], &'b [u8])> {
        let lines = self.lines.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
        lines.filter_map(|line| {
            let (name, value) = line.split_at_checked(line.iter().position(|byte| *byte == b':')?)?;
            Some((name, value.get(1..)?.trim_ascii()))
        })
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::{boxed::Box, format, string::String, vec::Vec};

    use super::*;

    fn table(name: &str) -> Box<[u8; TABLE]> {
        assert!(is_cookie_name(name));
        let mut table: Box<[u8; TABLE]> = std::vec![0; TABLE].try_into().expect("its size");
        automaton(name, &mut table);
        table
    }

    fn walk(table: &[u8; TABLE], state: u8, bytes: &[u8]) -> Reader {
        let mut reader = Reader::new(state);
        for byte in bytes {
            reader.step(table, *byte);
        }
        reader
    }

    /// What a request or response says: the value, or how it ends.
    fn check(state: u8, text: &str, expected: Result<&str, u8>) {
        let table = table("sid");
        let reader = walk(&table, state, text.as_bytes());
        match expected {
            Ok(value) => {
                assert_eq!(reader.state, FOUND, "{text:?}");
                assert_eq!(id(reader.hash), cookie_id(value.as_bytes()), "{text:?}");
                let end = &text[..reader.at as usize];
                assert!(
                    end.ends_with(&format!("sid={value}")) || end.ends_with(&format!("= {value}")),
                    "{end:?}"
                );
            }
            Err(state) => assert_eq!(reader.state, state, "{text:?}"),
        }
        // NULs, with which buffers are filled up, change nothing, wherever they come.
        let padded: String = text.chars().flat_map(|c| [c, '\0', '\0']).collect();
        let again = walk(&table, state, padded.as_bytes());
        assert_eq!((again.state, again.hash), (reader.state, reader.hash), "{text:?}");
    }

    #[test]
    fn requests() {
        let get = "GET / HTTP/1.1\r\nHost: x\r\n";
        for (rest, expected) in [
            ("Cookie: sid=abc\r\n\r\n", Ok("abc")),
            ("cookie:sid=abc\r\n\r\n", Ok("abc")),
            ("COOKIE:  sid=abc; a=b\r\n\r\n", Ok("abc")),
            ("Cookie: a=b; sid=abc; c=d\r\n", Ok("abc")),
            ("Cookie: a=b;sid=abc\n", Ok("abc")),
            ("Cookie: sid=a=b==\r\n", Ok("a=b==")),
            ("Cookie: sid=\"a\"\r\n", Ok("\"a\"")),
            ("Cookie: sid= abc\r\n", Ok("abc")),
            ("Cookie: sid=\r\nCookie: sid=abc\r\n", Ok("abc")),
            ("Cookie: sid=; sid=abc\r\n", Ok("abc")),
            ("Cookie: sid=abc; sid=def\r\n", Ok("abc")),
            ("Cookie: sidd=x; xsid=y; si=z; sid=abc\r\n", Ok("abc")),
            ("Cookie: SID=x\r\n\r\n", Err(END)),
            ("Cookie: sid\r\n\r\n", Err(END)),
            ("Cookies: sid=abc\r\n\r\n", Err(END)),
            ("X-Cookie: sid=abc\r\n\r\n", Err(END)),
            ("X: Cookie: sid=abc\r\n\r\n", Err(END)),
            ("Set-Cookie: sid=abc\r\n\r\n", Err(END)),
            ("\r\nCookie: sid=abc\r\n", Err(END)),
            ("\nCookie: sid=abc\n", Err(END)),
        ] {
            check(REQUEST, &format!("{get}{rest}"), expected);
        }
        check(REQUEST, "GET /?Cookie: sid=abc HTTP/1.1\r\n\r\n", Err(END));
        check(REQUEST, "\r\n\r\nGET / HTTP/1.1\r\nCookie: sid=abc\r\n", Ok("abc"));
        check(REQUEST, "M-SEARCH * HTTP/1.1\r\nCookie: sid=1\r\n", Ok("1"));
        for other in
            ["get / HTTP/1.1\r\n", "\r\n get / ", "SSH-2.0-x\r\n", "\u{16}\u{3}", "-A b", "EHLO\r\n", "\0\0"]
        {
            check(REQUEST, other, Err(NOT_HTTP));
        }
    }

    #[test]
    fn responses() {
        for (text, expected) in [
            ("HTTP/1.1 200 OK\r\nSet-Cookie: sid=abc; Path=/\r\n\r\n", Ok("abc")),
            ("HTTP/1.0 302 Found\r\nA: b\r\nset-cookie:sid=abc\r\n\r\n", Ok("abc")),
            ("HTTP/1.1 200\nSET-COOKIE: a=b; sid=x\nSet-Cookie: sid=abc\n\n", Ok("abc")),
            ("HTTP/1.1 100 Continue\r\nX: y\r\n\r\nHTTP/1.1 200 OK\r\nSet-Cookie: sid=a\r\n", Ok("a")),
            ("HTTP/1.1 200 OK\r\nSet-Cookie: sid=; Max-Age=0\r\n\r\n", Err(END)),
            ("HTTP/1.1 200 OK\r\nCookie: sid=abc\r\n\r\n", Err(END)),
            ("HTTP/1.1 200 OK\r\n\r\nSet-Cookie: sid=abc\r\n", Err(END)),
            ("HTTP/1.1 101 Switching\r\n\r\n\u{81}\u{5}", Err(NOT_HTTP)),
            ("HTTP/2 200", Err(RESPONSE_SKIP)),
            ("<html>", Err(NOT_HTTP)),
        ] {
            check(RESPONSE, text, expected);
        }
    }

    #[test]
    fn a_response_may_give_several() {
        let table = table("sid");
        let text = b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=one; Path=/\r\nSet-Cookie: sid=two\r\n\r\n";
        let first = walk(&table, RESPONSE, text);
        assert_eq!(id(first.hash), cookie_id(b"one"));
        let second = walk(&table, RESPONSE_SKIP, &text[first.at as usize..]);
        assert_eq!((second.state, id(second.hash)), (FOUND, cookie_id(b"two")));
    }

    #[test]
    fn cut_anywhere_it_goes_on() {
        let table = table("sid");
        let text = b"POST /a HTTP/1.1\r\nCookie: x=1; sid=0123456789abcdef; y=2\r\n\r\n";
        let end = text.windows(2).position(|w| w == b"f;").expect("there") + 1;
        for cut in 0..end {
            let part = walk(&table, REQUEST, &text[..cut]);
            assert!(!part.ended(), "{cut}");
            let mut rest = part;
            for byte in &text[cut..] {
                rest.step(&table, *byte);
            }
            assert_eq!((rest.state, id(rest.hash)), (FOUND, cookie_id(b"0123456789abcdef")), "{cut}");
            assert_eq!(rest.at as usize, end);
        }
    }

    #[test]
    fn any_name_fits() {
        let longest: String = "~".repeat(NAME_MAX);
        for name in ["a", "__Host-id", "JSESSIONID", longest.as_str()] {
            let table = table(name);
            let request = format!("GET / HTTP/1.1\r\nCookie: b=1; {name}=v\r\n");
            let reader = walk(&table, REQUEST, request.as_bytes());
            assert_eq!((reader.state, id(reader.hash)), (FOUND, cookie_id(b"v")), "{name}");
            // Every state that is used is one that was made.
            let reached: Vec<u8> = table.iter().copied().filter(|s| *s >= PAUSED).collect();
            assert!(reached.iter().all(|s| (PAUSED..=FOUND).contains(s)));
        }
        for name in ["", "a b", "a=b", "a;", "\u{e4}", "a".repeat(NAME_MAX + 1).as_str()] {
            assert!(!is_cookie_name(name), "{name:?}");
        }
    }

    #[test]
    fn an_automaton_tells_its_name() {
        let (mut again, mut room) = (table("x"), [0; NAME_MAX]);
        let longest: String = "~".repeat(NAME_MAX);
        for name in ["a", "__Host-id", "aaa", "cookie", "!#$%&'*+-.^_`|~", longest.as_str()] {
            let mut table = table(name);
            assert_eq!(name_of(&table, &mut again, &mut room), Some(name));
            // One cell is another.
            for at in [0, 7 << 8 | 99, TABLE - 1] {
                table[at] ^= 1;
                assert_eq!(name_of(&table, &mut again, &mut room), None, "{name} {at}");
                table[at] ^= 1;
            }
        }
        for byte in [0, 1, 3, 252, 255] {
            assert_eq!(name_of(&[byte; TABLE], &mut again, &mut room), None);
        }
    }

    #[test]
    fn hashes_differ_in_every_byte() {
        let base = *b"0123456789abcdef0123456789abcdef";
        let mut seen = std::collections::BTreeSet::new();
        for at in 0..base.len() {
            for byte in 0..=255 {
                let mut other = base;
                other[at] = byte;
                seen.insert(cookie_id(&other));
            }
            seen.insert(cookie_id(&base[..at]));
        }
        assert_eq!(seen.len(), 32 * 255 + 1 + 32);
    }

    /// The value of the cookie `sid` by the fields of a head, as far as it is there.
    fn by_fields(head: &Head<'_>) -> Option<[u8; 16]> {
        let cookies = head.fields().filter(|(name, _)| name.eq_ignore_ascii_case(b"cookie"));
        let mut pairs = cookies.flat_map(|(_, value)| value.split(|byte| *byte == b';'));
        pairs.find_map(|pair| {
            let value = pair.trim_ascii_start().strip_prefix(b"sid=")?.trim_ascii();
            (!value.is_empty()).then(|| cookie_id(value))
        })
    }

    #[test]
    fn the_head_of_a_request_on_every_prefix() {
        let text =
            b"\r\n\r\nPOST /a HTTP/1.1\r\nHost: x\r\ncOOKIE:\t a=b; sid=1 \r\nbad line\r\n\r\nbody: 1\r\n";
        let fields: [(&[u8], &[u8]); 2] = [(b"Host", b"x"), (b"cOOKIE", b"a=b; sid=1")];
        let whole = text.windows(4).rposition(|four| four == b"\r\n\r\n").expect("there") + 4;
        for end in 0..=text.len() {
            let head = Head::of_request(&text[..end]);
            assert_eq!(head.is_some(), end >= b"\r\n\r\nPOST ".len(), "{end}");
            let Some(head) = head else { continue };
            assert_eq!(head.is_whole(), end >= whole, "{end}");
            let found: Vec<_> = head.fields().collect();
            let lines = text[..end.min(whole)].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(found, fields[..lines.saturating_sub(3).min(2)], "{end}");
        }
        for other in ["get / HTTP/1.1\r\n", "SSH-2.0-x y\r\n", "-A b", "EHLO x\r\n", "GET /\r\n\r\n", " ", ""]
        {
            assert_eq!(Head::of_request(other.as_bytes()), None, "{other:?}");
        }
    }

    #[test]
    fn the_head_and_the_walk_agree() {
        let table = table("sid");
        for lines in [
            "",
            "Cookie: sid=abc\r\n",
            "cookie:sid=abc; a=b\r\n",
            "Cookie: a=b;sid=abc\n",
            "Cookie: sid= abc\r\n",
            "Cookie: sid=\r\nCookie: sid=abc\r\n",
            "Cookie: xsid=1; SID=2; sid\r\n",
            "Cookies: sid=abc\r\nX: Cookie: sid=abc\r\n",
            "Cookie : sid=abc\r\n",
        ] {
            for end in ["\r\n", "\n", ""] {
                let text = format!("GET / HTTP/1.1\r\nHost: x\r\n{lines}{end}");
                let head = Head::of_request(text.as_bytes()).expect("a request");
                let walked = walk(&table, REQUEST, text.as_bytes());
                let found = (walked.state == FOUND).then(|| id(walked.hash));
                assert_eq!(by_fields(&head), found, "{text:?}");
                assert_eq!(head.is_whole(), !end.is_empty(), "{text:?}");
                assert!(found.is_some() || head.is_whole() == (walked.state == END), "{text:?}");
            }
        }
    }
}
