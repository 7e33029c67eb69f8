//! Sessions in the state file: all of them in one transaction, a page of the crate's at a time.

use dispatcher_common::session::{BACKENDS_MAX, ID_MAX, Session, SessionKey};
use redb::{ReadableDatabase as _, TableDefinition, TableError};

use super::{Error, Store};

/// Number 0 is the head, the others have up to [`CHUNK`] sessions each.
const SESSIONS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("sessions");
/// Raised with each change of what a head or a session looks like here.
const LAYOUT: u32 = 1;
/// Bytes of a session.
const RECORD: usize = 77;
/// Sessions of a number: with what the crate adds, these just fit into 128 KiB, and it has pages of such sizes.
const CHUNK: usize = 1700;

/// What two clocks say at the same time, in seconds: the one by which sessions expire, which begins anew when the
/// machine does, and the one on the wall.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Clocks {
    pub(crate) monotonic: u32,
    pub(crate) wall: u64,
}

impl Store {
    /// Keeps sessions in place of those kept before; how many these are.
    pub(crate) fn keep_sessions(
        &self,
        clocks: Clocks,
        mut sessions: impl Iterator<Item = (SessionKey, Session)>,
    ) -> Result<u64, Error> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            transaction.delete_table(SESSIONS)?;
            let mut count = 0;
            {
                let mut table = transaction.open_table(SESSIONS)?;
                table.insert(0, head(clocks).as_slice())?;
                let mut bytes = Vec::with_capacity(CHUNK * RECORD);
                for number in 1.. {
                    bytes.clear();
                    sessions
                        .by_ref()
                        .take(CHUNK)
                        .for_each(|(key, session)| write(&mut bytes, &key, &session));
                    if bytes.is_empty() {
                        break;
                    }
                    count += (bytes.len() / RECORD) as u64;
                    table.insert(number, bytes.as_slice())?;
                }
            }
            transaction.commit()?;
            Ok(count)
        })
    }

    /// What the clocks said when sessions were kept, if some were.
    pub(crate) fn kept_at(&self) -> Result<Option<Clocks>, Error> {
        let Some(head) = self.numbered(0)? else { return Ok(None) };
        read_head(&head).map(Some).map_err(|found| Error::Layout {
            path: self.path.clone(),
            found,
            known: LAYOUT,
        })
    }

    /// The sessions of a number from 1; `None` after the last.
    pub(crate) fn kept(&self, number: u32) -> Result<Option<Vec<(SessionKey, Session)>>, Error> {
        let bytes = self.numbered(number)?;
        Ok(bytes.map(|bytes| bytes.chunks_exact(RECORD).filter_map(read).collect()))
    }

    fn numbered(&self, number: u32) -> Result<Option<Vec<u8>>, Error> {
        self.with(|database| match database.begin_read()?.open_table(SESSIONS) {
            Ok(table) => Ok(table.get(number)?.map(|bytes| bytes.value().to_vec())),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        })
    }
}

fn head(Clocks { monotonic, wall }: Clocks) -> Vec<u8> {
    [&LAYOUT.to_le_bytes()[..], &monotonic.to_le_bytes(), &wall.to_le_bytes()].concat()
}

/// The clocks, or the layout if it is another one.
fn read_head(mut bytes: &[u8]) -> Result<Clocks, u32> {
    let rest = &mut bytes;
    let layout = take(rest).map_or(0, u32::from_le_bytes);
    match (layout, take(rest), take(rest)) {
        (LAYOUT, Some(monotonic), Some(wall)) => {
            Ok(Clocks { monotonic: u32::from_le_bytes(monotonic), wall: u64::from_le_bytes(wall) })
        }
        (LAYOUT, ..) => Err(0),
        (other, ..) => Err(other),
    }
}

fn write(bytes: &mut Vec<u8>, key: &SessionKey, session: &Session) {
    // Named one by one, so that a new field is not forgotten.
    let SessionKey { service, kind, len, pad: _, id } = key;
    let Session { backends, tunnel, class, state, pad: _, created, used, expires, hits } = session;
    bytes.extend(service.to_le_bytes());
    bytes.extend([*kind, *len]);
    bytes.extend(id);
    backends.iter().for_each(|backend| bytes.extend(backend.to_le_bytes()));
    bytes.extend(tunnel.to_le_bytes());
    bytes.extend(class.to_le_bytes());
    bytes.push(*state);
    [created, used, expires, hits].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
}

fn read(mut bytes: &[u8]) -> Option<(SessionKey, Session)> {
    let rest = &mut bytes;
    let word = |rest: &mut &[u8]| take(rest).map(u32::from_le_bytes);
    let service = word(rest)?;
    let [kind, len] = take(rest)?;
    let id: [u8; ID_MAX] = take(rest)?;
    let key = SessionKey::new(service, kind, id.get(..usize::from(len))?)?;
    let mut backends = [0; BACKENDS_MAX];
    for backend in &mut backends {
        *backend = word(rest)?;
    }
    let tunnel = word(rest)?;
    let class = u16::from_le_bytes(take(rest)?);
    let [state] = take(rest)?;
    let [created, used, expires, hits] = [word(rest)?, word(rest)?, word(rest)?, word(rest)?];
    Some((key, Session { backends, tunnel, class, state, pad: 0, created, used, expires, hits }))
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use dispatcher_common::session::{KIND_COOKIE, KIND_TICKET_NAME, STATE_CONFIRMED};

    use super::{
        super::tests::{Folder, on_a_small_disk},
        *,
    };

    const CLOCKS: Clocks = Clocks { monotonic: 5, wall: 1_700_000_000 };

    fn some(n: u32) -> (SessionKey, Session) {
        let id = [n.to_le_bytes(), [7; 4]].concat();
        let kind = if n.is_multiple_of(2) { KIND_COOKIE } else { KIND_TICKET_NAME };
        let key = SessionKey::new(0x0102_0304, kind, &id).expect("a key");
        let session = Session {
            backends: [n, 2, 3, 4],
            tunnel: 5,
            class: 6,
            state: STATE_CONFIRMED,
            pad: 0,
            created: 8,
            used: 9,
            expires: 10,
            hits: 11,
        };
        (key, session)
    }

    fn all(store: &Store) -> Vec<(SessionKey, Session)> {
        let chunks = (1..).map_while(|number| store.kept(number).expect("readable"));
        chunks.flatten().collect()
    }

    /// Whoever changes these bytes must raise the layout.
    #[test]
    fn the_layout_is_what_its_number_says() {
        assert_eq!(LAYOUT, 1);
        let mut bytes = Vec::new();
        let (key, session) = some(0x0a0b_0c0d);
        write(&mut bytes, &key, &session);
        let mut expected = vec![4, 3, 2, 1, 2, 8, 0x0d, 0x0c, 0x0b, 0x0a, 7, 7, 7, 7];
        expected.extend([0; 24]);
        expected.extend([0x0d, 0x0c, 0x0b, 0x0a, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 6, 0, 2]);
        expected.extend([8, 0, 0, 0, 9, 0, 0, 0, 10, 0, 0, 0, 11, 0, 0, 0]);
        assert_eq!(bytes, expected);
        assert_eq!(bytes.len(), RECORD);
        assert_eq!(read(&bytes), Some((key, session)));
        for end in 0..bytes.len() {
            assert_eq!(read(&bytes[..end]), None, "{end} bytes");
        }
        bytes[5] = 33;
        assert_eq!(read(&bytes), None, "an identifier of 33 bytes");
        assert_eq!(head(CLOCKS), [1, 0, 0, 0, 5, 0, 0, 0, 0, 0xf1, 0x53, 0x65, 0, 0, 0, 0]);
    }

    #[test]
    fn sessions_come_back_and_replace_those_before() {
        let folder = Folder::new();
        let store = Store::open(&folder.file()).expect("opens");
        assert_eq!(store.kept_at().expect("readable"), None);
        for count in [0, 1, CHUNK as u32, 2 * CHUNK as u32 + 1, 3] {
            assert_eq!(store.keep_sessions(CLOCKS, (0..count).map(some)).expect("kept"), u64::from(count));
            assert_eq!(store.kept_at().expect("readable"), Some(CLOCKS));
            assert!(all(&store).into_iter().eq((0..count).map(some)), "{count}");
        }
    }

    #[test]
    fn another_layout_is_not_read() {
        let folder = Folder::new();
        let store = Store::open(&folder.file()).expect("opens");
        for (head, found) in [(&[2, 0, 0, 0, 9, 9][..], 2), (&[1, 0, 0, 0, 5, 0][..], 0), (&[][..], 0)] {
            let written = store.with(|database| {
                let transaction = database.begin_write()?;
                transaction.open_table(SESSIONS)?.insert(0, head)?;
                Ok(transaction.commit()?)
            });
            written.expect("written");
            let error = store.kept_at().expect_err("another layout");
            assert!(
                matches!(error, Error::Layout { found: one, known: LAYOUT, .. } if one == found),
                "{error}"
            );
        }
    }

    /// As root.
    #[test]
    fn a_full_disk_leaves_the_sessions_kept_before() {
        on_a_small_disk(|folder| {
            let store = Store::open(&folder.file()).expect("opens");
            store.keep_sessions(CLOCKS, (0..100).map(some)).expect("kept");
            let error = store.keep_sessions(CLOCKS, (0..100_000).map(some)).expect_err("no room");
            assert!(error.to_string().contains("make room"), "{error}");
            assert!(all(&store).into_iter().eq((0..100).map(some)));
            store.keep_sessions(CLOCKS, (0..90).map(some)).expect("what fits is kept");
            assert_eq!(all(&store).len(), 90);
        });
    }
}
