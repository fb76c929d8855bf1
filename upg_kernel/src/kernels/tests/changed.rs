//! Kernels on a mapped file that is changed while they read it.
//!
//! A second map of the same file simulates another process. Results are meaningless then, and a
//! kernel may panic, but it must not touch memory outside its slices. Outputs and inputs lie
//! between inaccessible pages, so an access there ends the process.

use super::super::*;
use crate::format::{Encoding, FileWriter, LayerInfo, UpgFile, header_capacity};
use crate::matrix::decode::Decode;
use crate::matrix::strips::STRIP_ROWS;
use crate::matrix::{BITMAP_GROUP, Matrix};
use crate::sparse::MdCSRMatrix;
use crate::test_data::{bitmap, grouped, noise, trellis};
use memmap2::MmapMut;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use safetensors::SafeTensors;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Environment variable with the seconds per instruction set.
const SECONDS: &str = "UPG_STRESS_SECONDS";

/// Enough for known faults to show; `tools/sanitize.sh` takes longer.
const DEFAULT_SECONDS: f64 = 2.0;

/// Two strips, the second one with one row; the columns are no multiple of a group.
const ROWS: usize = 65;
const COLS: usize = 4090;

/// Guard size: more than a row of deltas can lead past its end (64 entries times 255 columns
/// times 4 bytes, and more rows of them).
const GUARD: usize = 4 << 20;

/// Maximum bytes that the writer changes at once.
const LARGEST_CHANGE: usize = 512;

#[test]
fn a_file_that_changes_under_a_kernel_leads_nowhere_else() {
    let seconds = std::env::var(SECONDS).map_or(DEFAULT_SECONDS, |text| {
        text.parse().expect("a number of seconds")
    });
    silence_panics_of_passes();
    let matrices = matrices();
    let each = Duration::from_secs_f64(seconds / matrices.len() as f64);
    let folder = tempfile::tempdir().unwrap();
    for (name, layer, matrix) in &matrices {
        let path = folder.path().join(name);
        write(&path, layer, matrix);
        for kernels in Kernels::available() {
            let [done, panicked] = race(&path, kernels, each);
            println!(
                "{} {name}: {done} passes, {panicked} panics",
                kernels.name()
            );
            assert!(done + panicked > 0);
        }
    }
}

fn matrices() -> Vec<(&'static str, LayerInfo, Matrix)> {
    let layer = |encoding, group, hadamard| {
        let mut layer = LayerInfo::new("layer", ROWS, COLS, encoding);
        (layer.group, layer.hadamard) = (group, hadamard);
        layer
    };
    let mut matrices = Vec::new();
    // Entries far apart, and in runs.
    for (name, step) in [("mdcsr-16", 16), ("mdcsr-1", 1)] {
        let weight = |i: usize| f32::from((i % COLS).is_multiple_of(step));
        let weights: Vec<f32> = (0..ROWS * COLS).map(weight).collect();
        let matrix = MdCSRMatrix::from_dense(&weights, ROWS, COLS).unwrap();
        let layer = layer(Encoding::MdCsr, None, None);
        matrices.push((name, layer, Matrix::MdCsr(matrix)));
    }
    for (name, encoding, group) in [("q8", Encoding::Q8, 64), ("q4", Encoding::Q4, 32)] {
        let matrix = grouped(ROWS, COLS, group, encoding == Encoding::Q4);
        let layer = layer(encoding, Some(group), None);
        matrices.push((name, layer, Matrix::Grouped(matrix)));
    }
    for (name, encoding) in [("s8", Encoding::S8), ("s4", Encoding::S4)] {
        let matrix = bitmap(ROWS, COLS, encoding == Encoding::S4);
        let layer = layer(encoding, Some(BITMAP_GROUP), None);
        matrices.push((name, layer, Matrix::Bitmap(matrix)));
    }
    for (name, encoding, k) in [
        ("t2", Encoding::T2, 2),
        ("t3", Encoding::T3, 3),
        ("t4", Encoding::T4, 4),
    ] {
        let size = 1 << COLS.ilog2();
        let matrix = trellis(ROWS, COLS, k, size);
        let layer = layer(encoding, None, Some(size));
        matrices.push((name, layer, Matrix::Trellis(matrix)));
    }
    matrices
}

fn write(path: &Path, layer: &LayerInfo, matrix: &Matrix) {
    let keys = ["model", "compression_ratio", "bits_per_weight", "recipe"];
    let metadata: BTreeMap<String, String> = keys.map(|key| (key.into(), "-".into())).into();
    let layers = std::slice::from_ref(layer);
    let capacity = header_capacity(layers, [].into_iter(), &metadata).unwrap();
    let mut writer = FileWriter::create(path, capacity).unwrap();
    writer.layer(0, layer, matrix).unwrap();
    writer.finish(metadata, layers).unwrap();
}

thread_local! {
    /// Flag for expected panics of this thread, whose messages would drown all others.
    static IS_SILENT: Cell<bool> = const { Cell::new(false) };
}

fn silence_panics_of_passes() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IS_SILENT.get() {
                hook(info);
            }
        }));
    });
}

/// Runs every kernel on the matrix in `path` while its arrays are changed.
///
/// Returns how many passes returned and how many panicked.
fn race(path: &Path, kernels: Kernels, time: Duration) -> [usize; 2] {
    let file = UpgFile::open(path).unwrap();
    let matrix = file.matrix(0).unwrap();
    let stop = AtomicBool::new(false);
    let mut passes = [0; 2];
    std::thread::scope(|scope| {
        scope.spawn(|| change(path, &stop));
        let mut memory = Memory::new();
        let started = Instant::now();
        // At least one pass, however busy the machine is.
        while passes == [0; 2] || started.elapsed() < time {
            let pass = || run_all(matrix, kernels, &mut memory);
            IS_SILENT.set(true);
            let panicked = catch_unwind(AssertUnwindSafe(pass)).is_err();
            IS_SILENT.set(false);
            passes[usize::from(panicked)] += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    passes
}

/// Repeatedly changes a few bytes of an array and restores them.
fn change(path: &Path, stop: &AtomicBool) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    // SAFETY: the test examines what others do with these bytes; here they are only written.
    let mut map = unsafe { MmapMut::map_mut(&file) }.unwrap();
    let good = map.to_vec();
    let arrays = arrays(&good);
    let random = noise(LARGEST_CHANGE, 20);
    for turn in 0_usize.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let array = &arrays[turn % arrays.len()];
        let choice = noise(8, turn as u64);
        let len = array.len().min(1 + usize::from(choice[0]) * 2);
        // The end belongs to the last row, from which out of bounds is near.
        let start = match choice[1] % 2 {
            0 => array.end - len,
            _ => array.start + (array.len() - len) * usize::from(choice[2]) / 255,
        };
        let range = start..start + len;
        match choice[3] % 4 {
            0 => map[range.clone()].copy_from_slice(&random[..len]),
            1 => map[range.clone()].fill(0),
            _ => map[range.clone()].fill(255),
        }
        wait(choice[4]);
        map[range.clone()].copy_from_slice(&good[range]);
        wait(choice[5]);
    }
}

fn wait(spins: u8) {
    for _ in 0..spins {
        std::hint::spin_loop();
    }
}

/// Returns the byte ranges of the arrays of a file.
fn arrays(file: &[u8]) -> Vec<Range<usize>> {
    let (header_len, header) = SafeTensors::read_metadata(file).unwrap();
    let start = 8 + header_len;
    let places = header.tensors().into_values().map(|info| {
        let (first, end) = info.data_offsets;
        start + first..start + end
    });
    places.filter(|range| !range.is_empty()).collect()
}

/// Outputs and an input, each followed by inaccessible memory.
struct Memory {
    x: Guarded<f32>,
    row: Guarded<f32>,
    strip: Guarded<f32>,
    half: Guarded<bf16>,
    sums: Guarded<f32>,
    panel: Panel,
    vectors: Vec<Activations>,
}

impl Memory {
    fn new() -> Self {
        let mut x = Guarded::new(COLS);
        x.fill(1.0);
        Self {
            vectors: vec![Activations::new(&x); 9],
            x,
            row: Guarded::new(COLS),
            strip: Guarded::new(STRIP_ROWS * COLS),
            half: Guarded::new(COLS),
            sums: Guarded::new(STRIP_ROWS),
            panel: Panel::default(),
        }
    }
}

/// Runs every kernel on the last row and the last strip.
fn run_all(matrix: &Matrix, kernels: Kernels, memory: &mut Memory) {
    let last = ROWS - 1;
    decode(matrix, kernels, last, &mut memory.row);
    decode(matrix, kernels, last, &mut memory.half);
    let stored = matrix.stored();
    if !kernels.is_integer() {
        return stored.decode_rows(last, &mut memory.row);
    }
    if let Some(entries) = stored.entries(last) {
        kernels.decode_entries(entries, &mut memory.row[..]);
        kernels.decode_entries(entries, &mut memory.half[..]);
        kernels.dot_entries(entries, &memory.x);
        return;
    }
    for index in 0..ROWS.div_ceil(STRIP_ROWS) {
        let strip = stored.strip(index).unwrap();
        let rows = strip.scales.len();
        kernels.decode_row(strip, rows - 1, &mut memory.row);
        let start = (STRIP_ROWS - rows) * COLS;
        decode(
            matrix,
            kernels,
            index * STRIP_ROWS,
            &mut memory.strip[start..],
        );
        let start = STRIP_ROWS - rows;
        kernels.multiply(strip, &memory.vectors[0], &mut memory.sums[start..]);
        kernels.multiply_many(strip, &memory.vectors, &mut memory.panel);
    }
}

fn decode<T: Decode>(matrix: &Matrix, kernels: Kernels, first: usize, out: &mut [T]) {
    matrix.decode(kernels, first, false, out, &mut Vec::new());
}

/// Numbers between two inaccessible ranges of memory; the second starts where they end.
struct Guarded<T> {
    start: NonNull<c_void>,
    /// Bytes of all pages.
    size: usize,
    first: NonNull<T>,
    len: usize,
}

impl<T: bytemuck::Pod> Guarded<T> {
    fn new(len: usize) -> Self {
        const PAGE: usize = 1 << 16;
        let bytes = len * size_of::<T>();
        let middle = bytes.next_multiple_of(PAGE);
        let size = GUARD + middle + GUARD;
        // SAFETY: new memory that nothing else uses; the middle is made accessible below.
        unsafe {
            let start = mmap_anonymous(
                None,
                size.try_into().unwrap(),
                ProtFlags::PROT_NONE,
                MapFlags::MAP_PRIVATE,
            )
            .unwrap();
            let usable = start.byte_add(GUARD);
            let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            mprotect(usable, middle, access).unwrap();
            Self {
                start,
                size,
                first: usable.byte_add(middle - bytes).cast(),
                len,
            }
        }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` has made this many accessible, all zeros, which any plain number may be.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the memory of `new`, to which no borrow is left.
        unsafe { munmap(self.start, self.size) }.unwrap();
    }
}
