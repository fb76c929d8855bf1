//! Code that both ways to a GPU share.
//!
//! It has the compiled kernels, the buffers of weights, and the encoding of the calls of a plan.

use super::plan::{Dispatch, Element, Operand, Plan, SparseKernel, Weights};
use super::source;
use crate::error::{Error, ErrorKind, Result};
use crate::mapped::MappedFile;
use crate::matrix::Matrix;
use crate::prime_lut::PRIME_LUT;
use block2::RcBlock;
use bytemuck::cast_slice;
use nix::unistd::{SysconfVar, sysconf};
use objc2::rc::Retained;
use objc2::runtime::ProtocolObject;
use objc2_foundation::NSString;
use objc2_metal::{
    MTLBuffer, MTLComputePipelineState, MTLDevice, MTLGPUFamily, MTLLibrary, MTLResourceOptions,
    MTLSize,
};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

pub(super) type Device = Retained<ProtocolObject<dyn MTLDevice>>;
pub(super) type Pipeline = Retained<ProtocolObject<dyn MTLComputePipelineState>>;

type RawBuffer = Retained<ProtocolObject<dyn MTLBuffer>>;

/// Buffer from a byte offset on; cheap to clone.
#[derive(Clone)]
pub(super) struct GpuBuffer {
    shared: Arc<SharedBuffer>,
    pub offset: usize,
}

struct SharedBuffer(RawBuffer);

// SAFETY: Metal allows any thread to retain, release and bind a buffer. Its content is accessed
// only by `read`, which documents when, and by kernels, in the order of their encoder.
unsafe impl Send for SharedBuffer {}
// SAFETY: as above; no method changes data that another thread may read.
unsafe impl Sync for SharedBuffer {}

impl GpuBuffer {
    fn new(device: &Device, raw: Option<RawBuffer>, bytes: usize) -> Result<Self> {
        let raw = raw.ok_or_else(|| {
            let message = format!("{} has no buffer of {bytes} bytes", device.name());
            Error::new(ErrorKind::TooLarge, message)
        })?;
        Ok(Self::of(raw, 0))
    }

    /// Wraps a buffer that someone else created.
    pub fn of(raw: RawBuffer, offset: usize) -> Self {
        Self {
            shared: Arc::new(SharedBuffer(raw)),
            offset,
        }
    }

    /// Creates a buffer with a copy of these bytes, at least one.
    fn copied(device: &Device, bytes: &[u8]) -> Result<Self> {
        let start = NonNull::from(bytes).cast::<c_void>();
        // SAFETY: `start` points to that many bytes, which are copied before the call returns.
        let raw = unsafe {
            device.newBufferWithBytes_length_options(
                start,
                bytes.len(),
                MTLResourceOptions::StorageModeShared,
            )
        };
        Self::new(device, raw, bytes.len())
    }

    /// Returns whether no one else holds it, or still reads its old content.
    pub fn is_held_here_only(&mut self) -> bool {
        // Not the count, which does not synchronize with the reads of others.
        Arc::get_mut(&mut self.shared).is_some()
    }

    pub fn raw(&self) -> &RawBuffer {
        &self.shared.0
    }

    /// Returns the first `len` bytes.
    ///
    /// # Safety
    ///
    /// The buffer has at least `len` bytes in memory shared with the CPU. No kernel that writes
    /// them is running, or will be while the slice lives.
    pub unsafe fn read(&self, len: usize) -> &[u8] {
        // SAFETY: by the caller; a buffer has an address for as long as it lives.
        unsafe {
            let bytes = self.raw().contents().cast::<u8>().add(self.offset);
            std::slice::from_raw_parts(bytes.as_ptr(), len)
        }
    }
}

/// Device with the kernels of this crate.
pub(super) struct Gpu {
    pub device: Device,
    library: Retained<ProtocolObject<dyn MTLLibrary>>,
    pipelines: Mutex<HashMap<String, Pipeline>>,
    primes: GpuBuffer,
    /// Levels of `t2`, `t3` and `t4`.
    levels: [GpuBuffer; 3],
    /// Pages of mapped files with a live buffer, by address and length.
    files: Mutex<Vec<(usize, usize, Weak<SharedBuffer>)>>,
}

impl Gpu {
    /// Compiles the kernels.
    ///
    /// This takes some tenths of a second the first time on a machine; afterwards Metal has them in
    /// its cache. Errors (`Unsupported`): the device has no SIMD-group functions (before M1 and
    /// A14), or does not compile the kernels.
    pub fn new(device: Device) -> Result<Self> {
        let name = device.name();
        if !device.supportsFamily(MTLGPUFamily::Apple7) {
            let message = format!("{name} lacks the functions of SIMD-groups that the kernels use");
            return Err(unsupported(message).hint("an Apple GPU from M1 or A14 on has them"));
        }
        let library = library(&device)?;
        let levels = |k| {
            let levels = Plan::levels(k).expect("2, 3 or 4");
            GpuBuffer::copied(&device, cast_slice(&levels))
        };
        Ok(Self {
            primes: GpuBuffer::copied(&device, cast_slice(&PRIME_LUT))?,
            levels: [levels(2)?, levels(3)?, levels(4)?],
            library,
            pipelines: Mutex::default(),
            files: Mutex::default(),
            device,
        })
    }

    /// Returns the kernel of this name, compiled once.
    pub fn pipeline(&self, name: &str) -> Result<Pipeline> {
        let mut pipelines = self
            .pipelines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = pipelines.get(name) {
            return Ok(pipeline.clone());
        }
        let function = self.library.newFunctionWithName(&NSString::from_str(name));
        let function = function.ok_or_else(|| unsupported(format!("the kernels lack {name}")))?;
        let pipeline = self
            .device
            .newComputePipelineStateWithFunction_error(&function);
        let pipeline = pipeline.map_err(|e| {
            unsupported(format!(
                "{} does not run {name}: {}",
                self.device.name(),
                e.localizedDescription()
            ))
        })?;
        if pipeline.threadExecutionWidth() != 32 {
            let width = pipeline.threadExecutionWidth();
            return Err(unsupported(format!(
                "{name} runs in SIMD-groups of {width} threads, not 32"
            )));
        }
        pipelines.insert(name.to_string(), pipeline.clone());
        Ok(pipeline)
    }

    /// Creates a plan with as many threads as the pipelines of this device allow.
    pub fn plan<'a>(
        &self,
        matrix: &'a Matrix,
        vectors: usize,
        element: Element,
        sparse: SparseKernel,
    ) -> Result<Plan<'a>> {
        let failed = RefCell::new(None);
        let max_threads = |name: &str| match self.pipeline(name) {
            Ok(pipeline) => pipeline.maxTotalThreadsPerThreadgroup(),
            Err(e) => {
                failed.borrow_mut().get_or_insert(e);
                0
            }
        };
        let plan = Plan::with_kernel(matrix, vectors, element, sparse, max_threads);
        match failed.into_inner() {
            Some(e) => Err(e),
            None => plan,
        }
    }

    /// Creates an empty buffer shared with the CPU. Errors (`TooLarge`): the device cannot
    /// allocate this size.
    pub fn empty(&self, bytes: usize) -> Result<GpuBuffer> {
        let raw = self
            .device
            .newBufferWithLength_options(bytes.max(16), MTLResourceOptions::StorageModeShared);
        GpuBuffer::new(&self.device, raw, bytes)
    }

    /// Creates a buffer with a copy of these bytes, at least one.
    pub fn copied(&self, bytes: &[u8]) -> Result<GpuBuffer> {
        GpuBuffer::copied(&self.device, bytes)
    }

    /// Returns a buffer of weights: in place for a mapped file, otherwise copied.
    fn weights(&self, weights: &Weights<'_>) -> Result<GpuBuffer> {
        match weights.in_file() {
            Some((file, first)) => {
                let last = first + weights.bytes().len();
                self.view(file, first..last).map_err(|e| e.at(file.path()))
            }
            None => self.copied(weights.bytes()),
        }
    }

    /// Returns bytes of a file in place.
    ///
    /// The whole file is one buffer. If it exceeds the limit of the device, the buffer has the
    /// pages of these bytes.
    fn view(&self, file: &Arc<MappedFile>, bytes: Range<usize>) -> Result<GpuBuffer> {
        // Buffers consist of whole pages, as maps do.
        let page = page_size()?;
        let most = self.device.maxBufferLength();
        let mut pages = 0..file.len().next_multiple_of(page);
        if pages.len() > most {
            pages = bytes.start / page * page..bytes.end.next_multiple_of(page);
        }
        if pages.len() > most {
            let message = format!(
                "a matrix of {} bytes, and {} takes buffers of up to {most}",
                bytes.len(),
                self.device.name()
            );
            let error = Error::new(ErrorKind::TooLarge, message);
            return Err(error.hint("multiply it on the CPU: `Matrix::spmv`"));
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|(_, _, buffer)| buffer.strong_count() > 0);
        let offset = bytes.start - pages.start;
        let place = file.as_ptr() as usize + pages.start;
        let known = files
            .iter()
            .find(|(known, len, _)| *known == place && *len == pages.len());
        if let Some(shared) = known.and_then(|(_, _, buffer)| buffer.upgrade()) {
            return Ok(GpuBuffer { shared, offset });
        }
        let start = NonNull::from(&file[pages.start..]).cast::<c_void>();
        // The map stays until Metal releases the buffer,
        // which is after the last command that reads it.
        let map = Mutex::new(Some(Arc::clone(file)));
        let unmap = RcBlock::new(move |_: NonNull<c_void>, _: usize| {
            map.lock().unwrap_or_else(PoisonError::into_inner).take();
        });
        // SAFETY: `start` is the first byte of a page of a map, so it is page-aligned, and the map
        // has all bytes of its last page. The block keeps the map alive and may run on any thread.
        // Kernels only read it.
        let raw = unsafe {
            self.device
                .newBufferWithBytesNoCopy_length_options_deallocator(
                    start,
                    pages.len(),
                    MTLResourceOptions::StorageModeShared,
                    Some(&unmap),
                )
        };
        let view = GpuBuffer::new(&self.device, raw, pages.len())?;
        files.push((place, pages.len(), Arc::downgrade(&view.shared)));
        Ok(GpuBuffer { offset, ..view })
    }
}

/// Loads the kernels, precompiled by the build or from source.
fn library(device: &Device) -> Result<Retained<ProtocolObject<dyn MTLLibrary>>> {
    #[cfg(upg_metallib)]
    {
        let compiled = include_bytes!(concat!(env!("OUT_DIR"), "/spmv.metallib"));
        let compiled = dispatch2::DispatchData::from_static_bytes(compiled);
        match device.newLibraryWithData_error(&compiled) {
            Ok(library) => return Ok(library),
            Err(e) => log::warn!(
                "compiling the kernels again: {} does not take those of the build: {}",
                device.name(),
                e.localizedDescription()
            ),
        }
    }
    let text = NSString::from_str(&source());
    let library = device.newLibraryWithSource_options_error(&text, None);
    library.map_err(|e| {
        let reason = e.localizedDescription();
        unsupported(format!(
            "{} does not compile the kernels: {reason}",
            device.name()
        ))
        .hint("they need Metal 3 (macOS 13); please report this")
    })
}

/// Returns the page size of this process; under Rosetta it differs from that of the machine.
fn page_size() -> Result<usize> {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    let size = size.and_then(|size| usize::try_from(size).ok());
    size.ok_or_else(|| Error::new(ErrorKind::Io, "the system does not say how large a page is"))
}

fn unsupported(message: String) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

/// Matrix whose weights are in buffers.
pub(super) struct Resident {
    matrix: Matrix,
    /// Buffers by the address of the first byte, for arrays that have one.
    buffers: HashMap<usize, GpuBuffer>,
}

impl Resident {
    /// Creates the buffers. Weights that a kernel can read in their file stay there, all others
    /// are copied.
    pub fn new(gpu: &Gpu, matrix: &Matrix) -> Result<Self> {
        let mut resident = Self {
            matrix: matrix.clone(),
            buffers: HashMap::new(),
        };
        // Plans for any number of vectors have the same arrays.
        let plan = Plan::new(&resident.matrix, 1, Element::F32, |_| 1024)?;
        let operands = plan
            .dispatches
            .iter()
            .flat_map(|dispatch| &dispatch.operands);
        let mut buffers = HashMap::new();
        for operand in operands {
            if let Operand::Weights(weights) = operand
                && !weights.bytes().is_empty()
            {
                let place = weights.bytes().as_ptr() as usize;
                buffers.insert(place, gpu.weights(weights)?);
            }
        }
        resident.buffers = buffers;
        Ok(resident)
    }

    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }

    /// Returns the buffer; `None` for an array of no bytes.
    fn buffer(&self, weights: &Weights<'_>) -> Option<&GpuBuffer> {
        if weights.bytes().is_empty() {
            return None;
        }
        let place = weights.bytes().as_ptr() as usize;
        let buffer = self.buffers.get(&place);
        Some(buffer.expect("the arrays of a matrix do not move"))
    }
}

/// Buffers that a plan reads and writes besides the weights.
pub(super) struct Vectors {
    pub x: GpuBuffer,
    pub y: GpuBuffer,
    /// Rotated input; `None` if the plan has none.
    pub rotated: Option<GpuBuffer>,
}

/// Encoder of kernel calls, each of which runs after those that wrote its inputs.
pub(super) trait Encoder {
    fn pipeline(&mut self, pipeline: &Pipeline);
    fn bytes(&mut self, index: usize, bytes: &[u8]);
    fn buffer(&mut self, index: usize, buffer: &GpuBuffer, is_written: bool);
    /// Sets the threadgroup memory at index 0, where it stays for the following calls.
    fn threadgroup_memory(&mut self, bytes: usize);
    fn dispatch(&mut self, threadgroups: MTLSize, threads: MTLSize);
}

/// Encodes calls of a plan of the matrix.
pub(super) fn encode(
    gpu: &Gpu,
    resident: &Resident,
    dispatches: &[Dispatch<'_>],
    vectors: &Vectors,
    encoder: &mut impl Encoder,
) -> Result<()> {
    for dispatch in dispatches {
        encoder.pipeline(&gpu.pipeline(&dispatch.kernel)?);
        encoder.bytes(0, &dispatch.args);
        // The last operand is the one that is written.
        let last = dispatch.operands.len();
        for (index, operand) in (1..).zip(&dispatch.operands) {
            let buffer = match operand {
                Operand::Weights(weights) => resident.buffer(weights).unwrap_or(&gpu.primes),
                Operand::Levels(k) => &gpu.levels[usize::from(*k) - 2],
                Operand::X => &vectors.x,
                Operand::Y => &vectors.y,
                Operand::Rotated => vectors.rotated.as_ref().expect("made for the plan"),
                // Nothing reads it, but Metal's validation requires a buffer.
                Operand::Primes | Operand::Unused => &gpu.primes,
            };
            encoder.buffer(index, buffer, index == last);
        }
        if dispatch.threadgroup_bytes > 0 {
            encoder.threadgroup_memory(dispatch.threadgroup_bytes);
        }
        let [width, height] = dispatch.threadgroups;
        encoder.dispatch(size(width, height), size(dispatch.threads, 1));
    }
    Ok(())
}

fn size(width: usize, height: usize) -> MTLSize {
    MTLSize {
        width,
        height,
        depth: 1,
    }
}
