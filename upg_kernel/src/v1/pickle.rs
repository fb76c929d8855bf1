//! Pickle machine that calls nothing.
//!
//! It knows the opcodes and globals that a version 1 file needs, and refuses a file at the first
//! unknown one. Large strings stay in the file.
#![forbid(unsafe_code)]

use super::bytes::{Bytes, Files, Span};
use super::globals::{self, Global};
use super::lists::{Number, Run};
use super::objects::{Id, Object, Objects};
use crate::error::{Error, ErrorKind, Result};
use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

/// Maximum objects of a pickle. A tensor takes about 50 to 100.
const MOST_OBJECTS: usize = 1 << 19;
/// Maximum opcodes of a pickle.
const MOST_OPCODES: u32 = 1 << 21;
/// Maximum bytes of a text that is read. A longer one can only represent bytes, which stay in
/// the file.
const LONGEST_TEXT: u64 = 1 << 12;
/// Maximum total bytes of all texts that are read.
const MOST_TEXT: u64 = 1 << 26;
/// Minimum consecutive numbers that are left in the file. A shape, or the state of a type,
/// has fewer.
const SHORTEST_RUN: u64 = 16;
/// Maximum bytes of the name of a global.
const LONGEST_NAME: usize = 256;
/// Magic number of an old PyTorch checkpoint.
const TORCH: [u8; 14] = *b"\x80\x02\x8A\x0Al\xFC\x9CF\xF9 j\xA8P\x19";

/// Runs the pickle; returns all its objects and its result.
///
/// Cost: its opcodes, at most two million; arrays, and the numbers of long lists, are skipped.
/// Memory: at most about 200 MB more than at the start. Errors: `Io`; `Malformed` (truncated, stack
/// underflow, bytes after the end); `Unsupported` (an opcode or a global that no version 1 file
/// has); `TooLarge`.
pub(super) fn read(files: &Files) -> Result<(Objects, Id)> {
    let whole = files.whole(0);
    let mut machine = Machine {
        input: files.buffered(&whole),
        len: whole.len,
        position: 0,
        opcode_at: 0,
        files,
        objects: Objects::default(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        keys: HashSet::new(),
        text_left: MOST_TEXT,
        next_buffer: 1,
    };
    let at_start = machine.protocol();
    let top = at_start.and_then(|()| machine.run());
    let at = machine.opcode_at;
    let top = top.map_err(|e| e.place(format_args!("byte {at} of the pickle")))?;
    Ok((machine.objects, top))
}

struct Machine<'a> {
    input: BufReader<Span<'a>>,
    len: u64,
    position: u64,
    /// Position of the current opcode.
    opcode_at: u64,
    files: &'a Files,
    objects: Objects,
    stack: Vec<Id>,
    /// Stack heights.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Every key of every dict.
    keys: HashSet<(Id, Arc<str>)>,
    text_left: u64,
    next_buffer: usize,
}

impl Machine<'_> {
    /// Reads the two bytes that every pickle from protocol 2 on starts with.
    fn protocol(&mut self) -> Result<()> {
        if self
            .input
            .fill_buf()
            .is_ok_and(|start| start.starts_with(&TORCH))
        {
            let message = "this is a PyTorch checkpoint, not a version 1 file";
            return Err(Error::new(ErrorKind::Unsupported, message).hint(
                "convert the model to safetensors, and pass its directory to `upg compress`",
            ));
        }
        let [opcode, protocol] = self.bytes()?;
        if opcode != 0x80 || !(2..=5).contains(&protocol) {
            let message = "not a pickle of protocol 2 to 5";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(())
    }

    fn run(&mut self) -> Result<Id> {
        for _ in 0..MOST_OPCODES {
            self.opcode_at = self.position;
            let [opcode] = self.bytes()?;
            if opcode == b'.' {
                return self.stop();
            }
            self.step(opcode)?;
        }
        Err(too_large(format!("more than {MOST_OPCODES} opcodes")))
    }

    fn stop(&mut self) -> Result<Id> {
        let top = self.pop()?;
        if !self.stack.is_empty() || !self.marks.is_empty() {
            return Err(malformed("the pickle ends with more than one object"));
        }
        let passed = self.files.buffers();
        if self.next_buffer <= passed {
            let message = format!(
                "{passed} buffers were passed, it has {}",
                self.next_buffer - 1
            );
            return Err(Error::new(ErrorKind::Argument, message));
        }
        match self.len - self.position {
            0 => Ok(top),
            more => Err(malformed(format!(
                "{more} bytes after the end of the pickle"
            ))),
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            // FRAME: how much a reader may read at once. Only its content matters.
            0x95 => {
                let len = self.u64()?;
                self.check_left(len)
            }
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'N' => self.push(Object::None),
            _ if Number::has_opcode(opcode) => self.number(opcode),
            0x8C | b'X' | 0x8D => self.string(opcode),
            b'C' | b'B' | 0x8E | 0x96 => {
                let len = self.length(opcode)?;
                let bytes = self.pass_over(len)?;
                self.push(Object::Bytes(bytes))
            }
            0x97 => self.next_buffer(),
            // READONLY_BUFFER: nothing here writes to buffers.
            0x98 => match self.stack.last().map(|&id| self.objects.get(id)) {
                Some(Object::Bytes(_)) => Ok(()),
                _ => Err(malformed("no buffer to make read-only")),
            },
            b']' => self.push(Object::List(Vec::new())),
            b'}' => self.push(Object::Dict(Vec::new())),
            b')' => self.push(Object::Tuple(Vec::new())),
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.push(Object::Tuple(items))
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Object::Tuple(items))
            }
            b'a' => {
                let item = self.pop_many(1)?;
                self.append(item)
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)
            }
            b's' => {
                let item = self.pop_many(2)?;
                self.set_items(&item)
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)
            }
            b'q' => {
                let [key] = self.bytes()?;
                self.memoize(key.into())
            }
            b'r' => {
                let key = u32::from_le_bytes(self.bytes()?);
                self.memoize(key)
            }
            0x94 => self.memoize(self.memo.len() as u32),
            b'h' => {
                let [key] = self.bytes()?;
                self.recall(key.into())
            }
            b'j' => {
                let key = u32::from_le_bytes(self.bytes()?);
                self.recall(key)
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)
            }
            0x93 => self.stack_global(),
            b'R' | 0x81 => self.call(opcode == 0x81),
            b'b' => self.build(),
            other => Err(refused_opcode(other)),
        }
    }

    /// Reads the next bytes of the file.
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        self.check_left(out.len() as u64)?;
        self.read_exact(out)
    }

    fn u64(&mut self) -> Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn read_exact(&mut self, out: &mut [u8]) -> Result<()> {
        let read = self.input.read_exact(out);
        read.map_err(|e| Error::new(ErrorKind::Io, format!("cannot read: {e}")).with_source(e))?;
        self.position += out.len() as u64;
        Ok(())
    }

    fn check_left(&self, len: u64) -> Result<()> {
        let left = self.len - self.position;
        match len <= left {
            true => Ok(()),
            false => Err(malformed(format!(
                "cut short: {len} bytes are to follow, the file has {left}"
            ))),
        }
    }

    /// Reads a text up to the end of its line: a part of the name of a global.
    fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        loop {
            match self.bytes()? {
                [b'\n'] => break,
                _ if line.len() == LONGEST_NAME => {
                    return Err(malformed("the name of a global is too long"));
                }
                [byte] => line.push(byte),
            }
        }
        String::from_utf8(line).map_err(|_| malformed("the name of a global is not UTF-8"))
    }

    /// Reads the length of a string; the size of that number depends on the opcode.
    fn length(&mut self, opcode: u8) -> Result<u64> {
        Ok(match opcode {
            b'C' | 0x8C => u8::from_le_bytes(self.bytes()?).into(),
            b'B' | b'X' => u32::from_le_bytes(self.bytes()?).into(),
            _ => self.u64()?,
        })
    }

    fn number(&mut self, opcode: u8) -> Result<()> {
        let is_first = self.marks.last() == Some(&self.stack.len());
        if is_first && self.run_of_numbers(opcode)? {
            return Ok(());
        }
        let number = self.read_number(opcode)?;
        self.push(number.into())
    }

    fn read_number(&mut self, opcode: u8) -> Result<Number> {
        Number::read(opcode, |out| self.fill(out))
    }

    /// Skips the numbers of a list or tuple, whose first opcode is `opcode`.
    ///
    /// Returns `false`, at the original position, if they are few
    /// or not the whole content of the list.
    fn run_of_numbers(&mut self, opcode: u8) -> Result<bool> {
        let (mut opcode, first) = (opcode, self.position);
        let mut run = Run::new(self.opcode_at);
        while Number::has_opcode(opcode) {
            let number = self.read_number(opcode)?;
            run.add(number, self.position);
            self.opcode_at = self.position;
            [opcode] = self.bytes()?;
        }
        if run.count < SHORTEST_RUN || !matches!(opcode, b'e' | b't') {
            self.opcode_at = run.bytes.start;
            self.go_back_to(first)?;
            return Ok(false);
        }
        self.go_back_to(self.opcode_at)?;
        self.push(Object::Run(Box::new(run)))?;
        Ok(true)
    }

    fn go_back_to(&mut self, position: u64) -> Result<()> {
        let distance = self.position - position;
        self.position = position;
        self.seek(-(distance as i64))
    }

    fn seek(&mut self, distance: i64) -> Result<()> {
        let sought = self.input.seek_relative(distance);
        sought.map_err(|e| Error::new(ErrorKind::Io, format!("cannot read: {e}")).with_source(e))
    }

    /// Skips bytes and returns their location.
    fn pass_over(&mut self, len: u64) -> Result<Bytes> {
        self.check_left(len)?;
        let bytes = Bytes {
            file: 0,
            start: self.position,
            len,
            latin1: false,
        };
        self.position += len;
        let distance = i64::try_from(len).map_err(|_| malformed("a length above 2^63"))?;
        self.seek(distance)?;
        Ok(bytes)
    }

    fn string(&mut self, opcode: u8) -> Result<()> {
        let len = self.length(opcode)?;
        if len > LONGEST_TEXT {
            let text = self.pass_over(len)?;
            return self.push(Object::LongText(text));
        }
        self.check_left(len)?;
        self.text_left = self
            .text_left
            .checked_sub(len)
            .ok_or_else(|| too_large(format!("texts of more than {MOST_TEXT} bytes")))?;
        let place = Bytes {
            file: 0,
            start: self.position,
            len,
            latin1: false,
        };
        let mut text = vec![0; len as usize];
        self.read_exact(&mut text)?;
        let text = String::from_utf8(text).map_err(|_| malformed("a text that is not UTF-8"))?;
        self.push(Object::Text {
            text: text.into(),
            place,
        })
    }

    fn next_buffer(&mut self) -> Result<()> {
        let found = self.files.buffers();
        if self.next_buffer > found {
            let message = match found {
                0 => "its arrays are in out-of-band buffers, which are not in this file".to_owned(),
                found => {
                    format!("it has more out-of-band buffers than the {found} that were passed")
                }
            };
            return Err(Error::new(ErrorKind::Missing, message)
                .hint("`upg convert` takes the files of the buffers, --buffers FILE ..., in the order in which they were written"));
        }
        let bytes = self.files.whole(self.next_buffer);
        self.next_buffer += 1;
        self.push(Object::Bytes(bytes))
    }

    fn push(&mut self, object: Object) -> Result<()> {
        if self.objects.len() == MOST_OBJECTS {
            return Err(too_large(format!("more than {MOST_OBJECTS} objects")));
        }
        self.stack.push(self.objects.len());
        self.objects.push(object);
        Ok(())
    }

    /// Returns the stack height above which objects may be popped.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Id> {
        match self.stack.pop() {
            Some(id) if self.stack.len() >= self.floor() => Ok(id),
            _ => Err(underflow()),
        }
    }

    fn pop_many(&mut self, n: usize) -> Result<Vec<Id>> {
        let start = self.stack.len().checked_sub(n);
        match start.filter(|&start| start >= self.floor()) {
            Some(start) => Ok(self.stack.split_off(start)),
            None => Err(underflow()),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }

    /// Returns the object at the top of the stack without popping it.
    fn top(&self) -> Result<Id> {
        match self.stack.last() {
            Some(&id) if self.stack.len() > self.floor() => Ok(id),
            _ => Err(underflow()),
        }
    }

    fn append(&mut self, items: Vec<Id>) -> Result<()> {
        let list = self.top()?;
        let Object::List(list) = self.objects.get_mut(list) else {
            return Err(malformed(format!(
                "a list is to grow, but there is {}",
                self.objects.describe(list)
            )));
        };
        list.extend(items);
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<()> {
        let dict = self.top()?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(malformed("a key without a value"));
        }
        for &[key, value] in pairs {
            let Some(name) = self.objects.text(key).cloned() else {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{} as the key of a dict", self.objects.describe(key)),
                ));
            };
            let Object::Dict(items) = self.objects.get_mut(dict) else {
                return Err(malformed(format!(
                    "a dict is to grow, but there is {}",
                    self.objects.describe(dict)
                )));
            };
            items.push((Arc::clone(&name), value));
            if !self.keys.insert((dict, name)) {
                let message = format!("{} as a key twice in a dict", self.objects.describe(key));
                return Err(malformed(message));
            }
        }
        Ok(())
    }

    fn memoize(&mut self, key: u32) -> Result<()> {
        let top = self.top()?;
        if self.memo.len() == MOST_OBJECTS {
            return Err(too_large(format!(
                "more than {MOST_OBJECTS} places in the memo"
            )));
        }
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<()> {
        let id = self.memo.get(&key);
        let id = id.ok_or_else(|| malformed(format!("nothing in the memo at {key}")))?;
        self.stack.push(*id);
        Ok(())
    }

    fn stack_global(&mut self) -> Result<()> {
        let names = self.pop_many(2)?;
        match (self.objects.text(names[0]), self.objects.text(names[1])) {
            (Some(module), Some(name)) => {
                let (module, name) = (module.to_owned(), name.to_owned());
                self.global(&module, &name)
            }
            _ => Err(malformed("the name of a global is no text")),
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Result<()> {
        self.push(Object::Global(globals::find(module, name)?))
    }

    /// Handles REDUCE and NEWOBJ: instead of a call, looks at what was requested.
    fn call(&mut self, is_new: bool) -> Result<()> {
        let ids = self.pop_many(2)?;
        let Object::Global(global) = *self.objects.get(ids[0]) else {
            return Err(malformed(format!(
                "a call of {}",
                self.objects.describe(ids[0])
            )));
        };
        let Some(arguments) = self.objects.tuple(ids[1]) else {
            return Err(malformed("a call without a tuple of arguments"));
        };
        let made = globals::call(&self.objects, global, arguments, is_new)?;
        let made = match made {
            Object::Array(array) if global == Global::Scalar => array.scalar(self.files)?,
            made => made,
        };
        self.push(made)
    }

    fn build(&mut self) -> Result<()> {
        let state = self.pop_many(1)?[0];
        let target = self.top()?;
        let built = globals::build(&self.objects, target, state)?;
        self.objects.put(target, built);
        Ok(())
    }
}

fn malformed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Malformed, message)
}

fn too_large(message: String) -> Error {
    Error::new(ErrorKind::TooLarge, message)
}

fn underflow() -> Error {
    malformed("an opcode takes more from the stack than there is")
}

fn refused_opcode(opcode: u8) -> Error {
    let name = match opcode {
        b'0' => "POP",
        b'1' => "POP_MARK",
        b'2' => "DUP",
        b'F' => "FLOAT",
        b'I' => "INT",
        b'L' => "LONG",
        b'P' => "PERSID",
        b'Q' => "BINPERSID",
        b'S' => "STRING",
        b'T' => "BINSTRING",
        b'U' => "SHORT_BINSTRING",
        b'V' => "UNICODE",
        b'd' => "DICT",
        b'g' => "GET",
        b'i' => "INST",
        b'l' => "LIST",
        b'o' => "OBJ",
        b'p' => "PUT",
        0x80 => "PROTO",
        0x82 => "EXT1",
        0x83 => "EXT2",
        0x84 => "EXT4",
        0x8B => "LONG4",
        0x8F => "EMPTY_SET",
        0x90 => "ADDITEMS",
        0x91 => "FROZENSET",
        0x92 => "NEWOBJ_EX",
        _ => {
            let message = format!("0x{opcode:02X} is no pickle opcode");
            return Error::new(ErrorKind::Malformed, message);
        }
    };
    let message = format!("the pickle opcode {name}, which no version 1 file has");
    Error::new(ErrorKind::Unsupported, message)
}
