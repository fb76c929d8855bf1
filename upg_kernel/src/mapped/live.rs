//! List of mapped files and their addresses, which a signal handler can read.
#![forbid(unsafe_code)]

use crate::text::Shown;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering, fence};

/// Maximum number of listed maps. Further maps work,
/// but [`mapped_path_at`] does not find them.
const SLOTS: usize = 1024;

/// Maximum bytes of a listed path; a longer path is listed by its end.
pub const MAPPED_PATH_BYTES: usize = 512;

/// Value of [`Slot::start`] for a slot without a map.
const FREE: usize = 0;
/// Value of [`Slot::start`] for a slot that is being written.
const TAKEN: usize = 1;

/// Entry of one map.
///
/// The fields are atomic, so that reading them at any moment is defined. They belong together if
/// `generation` is the same before and after.
struct Slot {
    /// Number of maps that the slot has had.
    generation: AtomicUsize,
    start: AtomicUsize,
    bytes: AtomicUsize,
    path_bytes: AtomicUsize,
    path: [AtomicU8; MAPPED_PATH_BYTES],
}

/// All zero, so that it takes no space in the program file and no memory before it is used.
static LIVE: [Slot; SLOTS] = [const {
    Slot {
        generation: AtomicUsize::new(0),
        start: AtomicUsize::new(FREE),
        bytes: AtomicUsize::new(0),
        path_bytes: AtomicUsize::new(0),
        path: [const { AtomicU8::new(0) }; MAPPED_PATH_BYTES],
    }
}; SLOTS];

/// Entry in the list, for as long as this lives.
#[derive(Debug)]
pub(super) struct Listed(usize);

impl Listed {
    /// Lists a map; `None` if the list is full.
    pub(super) fn new(map: &[u8], path: &Path) -> Option<Self> {
        let take = |slot: &Slot| {
            let start = &slot.start;
            let taken = start.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed);
            taken.is_ok()
        };
        let index = LIVE.iter().position(take)?;
        let slot = &LIVE[index];
        // A thread that sees the new generation also sees that the slot is taken; one that sees any
        // of the new content also sees the new generation.
        slot.generation.fetch_add(1, Ordering::Release);
        fence(Ordering::Release);
        let path = shown(path);
        for (to, from) in slot.path.iter().zip(path.bytes()) {
            to.store(from, Ordering::Relaxed);
        }
        slot.path_bytes.store(path.len(), Ordering::Relaxed);
        slot.bytes.store(map.len(), Ordering::Relaxed);
        slot.start.store(map.as_ptr().addr(), Ordering::Release);
        Some(Self(index))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        LIVE[self.0].start.store(FREE, Ordering::Release);
    }
}

/// Returns a path as displayed in one line; only its end if it is long.
fn shown(path: &Path) -> String {
    const CUT: &str = "..";
    let mut text = Shown(path.display()).to_string();
    if text.len() > MAPPED_PATH_BYTES {
        let start = text.len() - (MAPPED_PATH_BYTES - CUT.len());
        text.replace_range(..text.ceil_char_boundary(start), CUT);
    }
    text
}

/// Copies the path of the file mapped at this address to the start of `path`,
/// as text for a message.
///
/// Returns its number of bytes. `None`: no known file is mapped there, or `path` is too short.
///
/// For signal handlers: takes no lock, allocates nothing, does not panic. Only files that are
/// mapped, not read ([`OpenOptions`](crate::OpenOptions)), have addresses here, and only the first
/// 1,024 of them.
pub fn mapped_path_at(address: usize, path: &mut [u8]) -> Option<usize> {
    LIVE.iter().find_map(|slot| slot.path_at(address, path))
}

impl Slot {
    fn path_at(&self, address: usize, path: &mut [u8]) -> Option<usize> {
        let generation = self.generation.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Acquire);
        let offset = address.checked_sub(start).filter(|_| start > TAKEN)?;
        if offset >= self.bytes.load(Ordering::Relaxed) {
            return None;
        }
        let len = self.path_bytes.load(Ordering::Relaxed);
        for (to, from) in path.get_mut(..len)?.iter_mut().zip(&self.path) {
            *to = from.load(Ordering::Relaxed);
        }
        // An equal address proves nothing: the slot may have been given
        // to another map there meanwhile.
        fence(Ordering::Acquire);
        (self.generation.load(Ordering::Relaxed) == generation).then_some(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_at(address: usize) -> Option<String> {
        let mut path = [0; MAPPED_PATH_BYTES];
        let len = mapped_path_at(address, &mut path)?;
        Some(str::from_utf8(&path[..len]).unwrap().to_owned())
    }

    #[test]
    fn an_address_in_a_map_is_found_as_long_as_it_is_listed() {
        let maps = [vec![0u8; 100], vec![0u8; 1]];
        let [first, second] = maps.each_ref().map(|map| map.as_ptr().addr());
        let listed = Listed::new(&maps[0], Path::new("a/first"));
        let other = Listed::new(&maps[1], Path::new("second\n\u{1b}[2J\u{202e}"));
        for offset in [0, 1, 99] {
            assert_eq!(path_at(first + offset).as_deref(), Some("a/first"));
        }
        let spelled = r"second\n\u{1b}[2J\u{202e}";
        assert_eq!(path_at(second).as_deref(), Some(spelled));
        assert_ne!(path_at(first + 100).as_deref(), Some("a/first"));
        assert_eq!((path_at(0), path_at(1)), (None, None));
        assert_eq!(mapped_path_at(first, &mut [0; 3]), None);
        drop(listed);
        assert_eq!(path_at(first), None);
        assert!(path_at(second).is_some());
        drop(other);
    }

    #[test]
    fn of_a_long_path_the_end_is_shown() {
        let map = [0u8];
        let long = format!("/{}/model", "ä".repeat(400));
        let _listed = Listed::new(&map, Path::new(&long));
        let found = path_at(map.as_ptr().addr()).unwrap();
        assert!(found.len() <= MAPPED_PATH_BYTES && found.len() > MAPPED_PATH_BYTES - 4);
        assert!(
            found.starts_with("..ä") && found.ends_with("ä/model"),
            "{found}"
        );
    }

    /// While slots are taken and released, nobody finds the path of another map.
    #[test]
    fn what_is_found_belongs_together() {
        use std::sync::atomic::AtomicBool;
        let ended = AtomicBool::new(false);
        let maps = [[0u8; 64], [1; 64], [2; 64]];
        let names = ["a", "bbbbbbbbbbbbbbbbbbbbbbbb", "cccccccc"];
        std::thread::scope(|scope| {
            for (map, name) in maps.iter().zip(names) {
                let ended = &ended;
                scope.spawn(move || {
                    while !ended.load(Ordering::Relaxed) {
                        drop(Listed::new(map, Path::new(name)));
                    }
                });
            }
            for i in 0..200_000 {
                let (map, name) = (&maps[i % 3], names[i % 3]);
                let found = path_at(map.as_ptr().addr() + i % 64);
                assert!(found.is_none_or(|found| found == name), "{i}");
            }
            ended.store(true, Ordering::Relaxed);
        });
    }
}
