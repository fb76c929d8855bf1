//! What both ways to a GPU share: compiled kernels, buffers of weights, and how the calls of a plan are encoded.

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

/// A buffer, from so many bytes on; cheap to clone.
#[derive(Clone)]
pub(super) struct GpuBuffer {
    shared: Arc<SharedBuffer>,
    pub offset: usize,
}

struct SharedBuffer(RawBuffer);

// SAFETY: Metal lets any thread retain, release and bind a buffer. What is in one is touched by `read` only, which says
// when, and by kernels, in the order of their encoder.
unsafe impl Send for SharedBuffer {}
// SAFETY: as above; no method changes what another thread may look at.
unsafe impl Sync for SharedBuffer {}

impl GpuBuffer {
    fn new(device: &Device, raw: Option<RawBuffer>, bytes: usize) -> Result<Self> {
        let raw = raw.ok_or_else(|| {
            let message = format!("{} has no buffer of {bytes} bytes", device.name());
            Error::new(ErrorKind::TooLarge, message)
        })?;
        Ok(Self::of(raw, 0))
    }

    /// A buffer that somebody else has made.
    pub fn of(raw: RawBuffer, offset: usize) -> Self {
        Self {
            shared: Arc::new(SharedBuffer(raw)),
            offset,
        }
    }

    /// These bytes, of which there are some, copied.
    fn copied(device: &Device, bytes: &[u8]) -> Result<Self> {
        let start = NonNull::from(bytes).cast::<c_void>();
        // SAFETY: `start` has as many bytes, which are copied before the call returns.
        let raw = unsafe {
            device.newBufferWithBytes_length_options(
                start,
                bytes.len(),
                MTLResourceOptions::StorageModeShared,
            )
        };
        Self::new(device, raw, bytes.len())
    }

    /// Whether nobody else has it, nor reads any more what was in it.
    pub fn is_held_here_only(&mut self) -> bool {
        // Not the count, which says nothing of when others were done.
        Arc::get_mut(&mut self.shared).is_some()
    }

    pub fn raw(&self) -> &RawBuffer {
        &self.shared.0
    }

    /// The first `len` bytes.
    ///
    /// # Safety
    ///
    /// The buffer has as many, in memory that the CPU shares, and no kernel that writes them is running or will be while
    /// the slice lives.
    pub unsafe fn read(&self, len: usize) -> &[u8] {
        // SAFETY: by the caller; a buffer has a place for as long as it lives.
        unsafe {
            let bytes = self.raw().contents().cast::<u8>().add(self.offset);
            std::slice::from_raw_parts(bytes.as_ptr(), len)
        }
    }
}

/// A device with the kernels of this crate.
pub(super) struct Gpu {
    pub device: Device,
    library: Retained<ProtocolObject<dyn MTLLibrary>>,
    pipelines: Mutex<HashMap<String, Pipeline>>,
    primes: GpuBuffer,
    /// Of `t2`, `t3` and `t4`.
    levels: [GpuBuffer; 3],
    /// Pages of mapped files, by their place and length, that somebody has a buffer of.
    files: Mutex<Vec<(usize, usize, Weak<SharedBuffer>)>>,
}

impl Gpu {
    /// Compiles the kernels: some tenths of a second, the first time on a machine; then Metal has them in its cache.
    ///
    /// Errors (`Unsupported`): the device has no SIMD-group functions (before M1 and A14), or does not compile the kernels.
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

    /// The kernel of this name, compiled once.
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

    /// A plan with as many threads as the pipelines of this device may have.
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

    /// An empty buffer that the CPU shares. Errors (`TooLarge`): the device has none of this size.
    pub fn empty(&self, bytes: usize) -> Result<GpuBuffer> {
        let raw = self
            .device
            .newBufferWithLength_options(bytes.max(16), MTLResourceOptions::StorageModeShared);
        GpuBuffer::new(&self.device, raw, bytes)
    }

    /// A buffer with these bytes, of which there are some, copied.
    pub fn copied(&self, bytes: &[u8]) -> Result<GpuBuffer> {
        GpuBuffer::copied(&self.device, bytes)
    }

    /// Weights for kernels: those of a mapped file where they are, others copied.
    fn weights(&self, weights: &Weights<'_>) -> Result<GpuBuffer> {
        match weights.in_file() {
            Some((file, first)) => {
                let last = first + weights.bytes().len();
                self.view(file, first..last).map_err(|e| e.at(file.path()))
            }
            None => self.copied(weights.bytes()),
        }
    }

    /// Bytes of a file in place: the whole file is one buffer, or, if that is more than the device takes, the pages of these
    /// bytes are.
    fn view(&self, file: &Arc<MappedFile>, bytes: Range<usize>) -> Result<GpuBuffer> {
        // Buffers are of whole pages, as maps are.
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
        // The map stays until Metal lets go of the buffer, which is after the last command that reads it.
        let map = Mutex::new(Some(Arc::clone(file)));
        let unmap = RcBlock::new(move |_: NonNull<c_void>, _: usize| {
            map.lock().unwrap_or_else(PoisonError::into_inner).take();
        });
        // SAFETY: `start` is the first byte of a page of a map, which begins a page and has all bytes of its last one; the
        // block keeps it, and may run on any thread. Kernels only read it.
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

/// The kernels: as the build has compiled them, or from their source.
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

/// Of this process: under Rosetta it is another than that of the machine.
fn page_size() -> Result<usize> {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    let size = size.and_then(|size| usize::try_from(size).ok());
    size.ok_or_else(|| Error::new(ErrorKind::Io, "the system does not say how large a page is"))
}

fn unsupported(message: String) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

/// A matrix whose weights are in buffers.
pub(super) struct Resident {
    matrix: Matrix,
    /// By the place of the first byte, of arrays that have one.
    buffers: HashMap<usize, GpuBuffer>,
}

impl Resident {
    /// Weights that a kernel can read in their file stay there, all others are copied.
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

    /// `None` for an array of no bytes.
    fn buffer(&self, weights: &Weights<'_>) -> Option<&GpuBuffer> {
        if weights.bytes().is_empty() {
            return None;
        }
        let place = weights.bytes().as_ptr() as usize;
        let buffer = self.buffers.get(&place);
        Some(buffer.expect("the arrays of a matrix do not move"))
    }
}

/// What a plan reads and writes besides weights.
pub(super) struct Vectors {
    pub x: GpuBuffer,
    pub y: GpuBuffer,
    /// `None` where the plan has no rotated input.
    pub rotated: Option<GpuBuffer>,
}

/// Calls of kernels, each after those that have written what it reads.
pub(super) trait Encoder {
    fn pipeline(&mut self, pipeline: &Pipeline);
    fn bytes(&mut self, index: usize, bytes: &[u8]);
    fn buffer(&mut self, index: usize, buffer: &GpuBuffer, is_written: bool);
    /// At index 0, where it stays for the calls after it.
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
        // The one that is written comes last.
        let last = dispatch.operands.len();
        for (index, operand) in (1..).zip(&dispatch.operands) {
            let buffer = match operand {
                Operand::Weights(weights) => resident.buffer(weights).unwrap_or(&gpu.primes),
                Operand::Levels(k) => &gpu.levels[usize::from(*k) - 2],
                Operand::X => &vectors.x,
                Operand::Y => &vectors.y,
                Operand::Rotated => vectors.rotated.as_ref().expect("made for the plan"),
                // Nothing reads it, but the validation of Metal wants something there.
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
