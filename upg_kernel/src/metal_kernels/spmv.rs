//! Implementation of [`MetalSpMV`] on systems with Metal.

use super::gpu::{Device, Encoder, Gpu, GpuBuffer, Pipeline, Resident, Vectors, encode};
use super::hazards::Hazards;
use super::plan::{Element, SparseKernel};
use crate::error::{Error, ErrorKind, Result};
use crate::matrix::Matrix;
use crate::rotation::Rotation;
use bytemuck::{Pod, cast_slice};
use candle_core::{DType, Tensor, WithDType};
use half::f16;
use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_metal::{
    MTLBarrierScope, MTLCommandBuffer, MTLCommandBufferStatus, MTLCommandEncoder, MTLCommandQueue,
    MTLComputeCommandEncoder, MTLCreateSystemDefaultDevice, MTLDevice, MTLDispatchType, MTLSize,
};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Products of compressed matrices with vectors on the GPU of this machine.
///
/// **Not run on hardware yet**: `docs/gpu.md` says what was checked.
///
/// ```no_run
/// # fn main() -> upg_kernel::Result<()> {
/// use candle_core::{Device, Tensor};
/// use upg_kernel::UPGDecompressor;
/// use upg_kernel::metal_kernels::MetalSpMV;
///
/// let file = UPGDecompressor::from_safetensors("models/smollm2-q4.safetensors")?;
/// let (info, matrix) = file.layer(0)?;
/// let metal = MetalSpMV::new()?;
/// let x = Tensor::ones(info.cols, candle_core::DType::F32, &Device::Cpu)?;
/// let y = metal.execute(matrix, &x)?; // [rows]
///
/// // Many products, with weights and results that stay on the GPU:
/// let matrix = metal.load(matrix)?;
/// let x = metal.vector(&vec![1.0f32; info.cols], 1)?;
/// let mut pass = metal.pass()?;
/// let y = pass.spmv(&matrix, &x)?;
/// pass.finish()?;
/// let y: Vec<f32> = y.to_vec()?;
/// # Ok(())
/// # }
/// ```
pub struct MetalSpMV {
    device: Gpu,
    command_queue: Retained<ProtocolObject<dyn MTLCommandQueue>>,
    /// Buffers of results by size; unused ones are recycled. They stay until this is dropped.
    free: Mutex<Vec<(usize, GpuBuffer)>>,
}

// Framework that `MTLCreateSystemDefaultDevice` needs to find a device.
#[cfg(target_os = "macos")]
#[link(name = "CoreGraphics", kind = "framework")]
unsafe extern "C" {}

impl MetalSpMV {
    /// Opens the default device and compiles the kernels (some tenths
    /// of a second the first time).
    ///
    /// Errors (`Unsupported`): there is no device, or it lacks a feature that the message names.
    pub fn new() -> Result<Self> {
        // A process without a window, for example in ssh, has no default device.
        let device = MTLCreateSystemDefaultDevice();
        #[cfg(target_os = "macos")]
        let device = device.or_else(|| objc2_metal::MTLCopyAllDevices().firstObject());
        let device = device.ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "there is no Metal device here")
                .hint("multiply on the CPU: `Matrix::spmv`")
        })?;
        // Metal's results belong to an autorelease pool, which a Rust thread does not have.
        autoreleasepool(|_| Self::on(device))
    }

    fn on(device: Device) -> Result<Self> {
        let command_queue = device.newCommandQueue().ok_or_else(|| {
            let message = format!("{} has no command queue", device.name());
            Error::new(ErrorKind::Unsupported, message)
        })?;
        Ok(Self {
            device: Gpu::new(device)?,
            command_queue,
            free: Mutex::default(),
        })
    }

    /// Returns the name of the device.
    pub fn device_name(&self) -> String {
        self.device.device.name().to_string()
    }

    /// Returns the recommended maximum bytes of weights and vectors on the device for good speed.
    pub fn working_set(&self) -> u64 {
        self.device.device.recommendedMaxWorkingSetSize()
    }

    /// Computes `W x` for a vector `[cols]`, or for each row of `[n, cols]`.
    ///
    /// The result is a tensor `[rows]` or `[n, rows]` of the same type on the CPU, on whatever
    /// device `vector` is. Waits for the GPU. Creates temporary buffers of the weights (a copy of
    /// those that are not mapped): [`MetalSpMV::load`] creates them once.
    ///
    /// Errors: `Unsupported` for a type other than F32 and F16 or a matrix that is not compressed;
    /// `Shape` for a tensor of another shape, `Argument` for one of no vectors; `TooLarge` if the
    /// device is out of memory.
    pub fn execute(&self, matrix: &Matrix, vector: &Tensor) -> Result<Tensor> {
        match vector.dtype() {
            DType::F32 => self.execute_as::<f32>(matrix, vector),
            DType::F16 => self.execute_as::<f16>(matrix, vector),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("a vector of {other:?}, expected F32 or F16"),
            )),
        }
    }

    fn execute_as<T: MetalFloat + WithDType>(
        &self,
        matrix: &Matrix,
        vector: &Tensor,
    ) -> Result<Tensor> {
        let mut shape = vector.dims().to_vec();
        let (rows, cols) = (matrix.rows(), matrix.cols());
        if !matches!(shape.len(), 1 | 2) || shape.last() != Some(&cols) {
            let message = format!("a tensor {shape:?} for a matrix [{rows}, {cols}]");
            let hint = format!("use [{cols}] or [n, {cols}]");
            return Err(Error::new(ErrorKind::Shape, message).hint(hint));
        }
        let values: Vec<T> = vector.flatten_all()?.to_vec1()?;
        let matrix = self.load(matrix)?;
        let x = self.vector(&values, values.len() / cols)?;
        let mut pass = self.pass()?;
        let y = pass.spmv(&matrix, &x)?;
        pass.finish()?;
        *shape.last_mut().expect("one or two dimensions") = rows;
        Ok(Tensor::from_vec(
            y.to_vec::<T>()?,
            shape,
            &candle_core::Device::Cpu,
        )?)
    }

    /// Computes products of vectors, with results as bytes, for tests of all kernels.
    #[cfg(test)]
    pub(super) fn products(
        &self,
        matrix: &Matrix,
        sparse: SparseKernel,
        x: &[u8],
        vectors: usize,
        element: Element,
    ) -> Result<Vec<u8>> {
        let x = MetalVector {
            buffer: self.device.copied(x)?,
            n: vectors,
            len: matrix.cols(),
            element,
            is_ready: Arc::new(AtomicBool::new(true)),
        };
        let mut pass = self.pass()?;
        let y = pass.spmv_with(&self.load(matrix)?, &x, sparse)?;
        pass.finish()?;
        Ok(match element {
            Element::F32 => cast_slice(&y.to_vec::<f32>()?).to_vec(),
            Element::F16 => cast_slice(&y.to_vec::<f16>()?).to_vec(),
        })
    }

    /// Prepares the matrix for kernels: mapped weights stay in place, others are copied.
    ///
    /// Errors: `Unsupported` for a matrix that is not compressed; `TooLarge` if the device is out
    /// of memory.
    pub fn load(&self, matrix: &Matrix) -> Result<MetalMatrix> {
        Ok(MetalMatrix(Arc::new(Resident::new(&self.device, matrix)?)))
    }

    /// Copies `n` consecutive vectors to the GPU.
    ///
    /// Errors (`Argument`): `values` is not `n` vectors of equal length.
    pub fn vector<T: MetalFloat>(&self, values: &[T], n: usize) -> Result<MetalVector> {
        if n == 0 || values.is_empty() || !values.len().is_multiple_of(n) {
            let message = format!("{} values are not {n} vectors", values.len());
            return Err(Error::new(ErrorKind::Argument, message));
        }
        Ok(MetalVector {
            buffer: self.device.copied(cast_slice(values))?,
            n,
            len: values.len() / n,
            element: T::ELEMENT,
            is_ready: Arc::new(AtomicBool::new(true)),
        })
    }

    /// Starts a pass: products that run without the CPU in between.
    ///
    /// Independent products run concurrently. The queue holds 64 passes that were started and
    /// neither finished nor dropped; the next call blocks, for ever on one thread.
    pub fn pass(&self) -> Result<MetalPass<'_>> {
        let none = || Error::new(ErrorKind::TooLarge, "the device has no room for commands");
        autoreleasepool(|_| {
            let commands = self.command_queue.commandBuffer().ok_or_else(none)?;
            let encoder =
                commands.computeCommandEncoderWithDispatchType(MTLDispatchType::Concurrent);
            Ok(MetalPass {
                spmv: self,
                commands,
                encoder: Raw {
                    encoder: encoder.ok_or_else(none)?,
                    hazards: Hazards::default(),
                },
                is_encoding: true,
                results: Vec::new(),
                inputs: Vec::new(),
                rotated: Vec::new(),
            })
        })
    }

    /// Returns a buffer of at least this many bytes that no one else holds.
    fn result(&self, bytes: usize) -> Result<GpuBuffer> {
        let size = bytes
            .checked_next_power_of_two()
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, format!("a result of {bytes} bytes")))?;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, buffer) in free.iter_mut().filter(|(found, _)| *found == size) {
            if buffer.is_held_here_only() {
                return Ok(buffer.clone());
            }
        }
        let buffer = self.device.empty(size)?;
        free.push((size, buffer.clone()));
        Ok(buffer)
    }
}

/// Type of vectors on the GPU: `f32` or `f16`.
pub trait MetalFloat: Pod {
    /// Element type in plans.
    const ELEMENT: Element;
}

impl MetalFloat for f32 {
    const ELEMENT: Element = Element::F32;
}

impl MetalFloat for f16 {
    const ELEMENT: Element = Element::F16;
}

/// Matrix that kernels can read; cheap to clone.
#[derive(Clone)]
pub struct MetalMatrix(Arc<Resident>);

impl MetalMatrix {
    /// Returns the matrix.
    pub fn matrix(&self) -> &Matrix {
        self.0.matrix()
    }
}

/// Vectors on the GPU, all f32 or all f16; cheap to clone.
#[derive(Clone)]
pub struct MetalVector {
    buffer: GpuBuffer,
    n: usize,
    len: usize,
    element: Element,
    /// Flag: the pass that writes it has finished.
    is_ready: Arc<AtomicBool>,
}

impl MetalVector {
    /// Returns the number of vectors and their length.
    pub fn shape(&self) -> (usize, usize) {
        (self.n, self.len)
    }

    fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::Acquire)
    }

    /// Returns whether it is the same value, not another one with equal elements.
    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.is_ready, &other.is_ready)
    }

    /// Returns the elements, vector by vector.
    ///
    /// Errors (`Argument`): `T` is not their type, or the pass that computes them has not finished.
    pub fn to_vec<T: MetalFloat>(&self) -> Result<Vec<T>> {
        if T::ELEMENT != self.element {
            let message = format!("vectors of {:?} read as {:?}", self.element, T::ELEMENT);
            return Err(Error::new(ErrorKind::Argument, message));
        }
        if !self.is_ready() {
            let message = "the pass that computes this vector has not finished";
            return Err(Error::new(ErrorKind::Argument, message).hint("call `finish` on it"));
        }
        // SAFETY: created with this many bytes, in shared memory;
        // the only pass that writes it has finished.
        let bytes = unsafe { self.buffer.read(self.n * self.len * size_of::<T>()) };
        Ok(cast_slice(bytes).to_vec())
    }
}

/// Products that are encoded, but computed only by [`MetalPass::finish`]. Dropping it
/// computes nothing.
pub struct MetalPass<'a> {
    spmv: &'a MetalSpMV,
    commands: Retained<ProtocolObject<dyn MTLCommandBuffer>>,
    encoder: Raw,
    is_encoding: bool,
    results: Vec<MetalVector>,
    /// Inputs; with the results these are all buffers of the pass, which are not recycled while
    /// it holds them.
    inputs: Vec<MetalVector>,
    /// Inputs that were rotated, and the result: matrices that share an input share its rotation.
    rotated: Vec<(MetalVector, Rotation, GpuBuffer)>,
}

impl MetalPass<'_> {
    /// Computes `W x` for each vector of `x`, which may be a result of this pass.
    ///
    /// Errors: `Shape` if the vectors have another length than the matrix has columns;
    /// `Argument` if `x` belongs to another pass that has not finished; `TooLarge` if the
    /// device is out of memory.
    pub fn spmv(&mut self, matrix: &MetalMatrix, x: &MetalVector) -> Result<MetalVector> {
        self.spmv_with(matrix, x, SparseKernel::default())
    }

    /// Runs [`MetalPass::spmv`] with this kernel, if the matrix is `mdcsr`.
    pub fn spmv_with(
        &mut self,
        matrix: &MetalMatrix,
        x: &MetalVector,
        sparse: SparseKernel,
    ) -> Result<MetalVector> {
        let (rows, cols) = (matrix.matrix().rows(), matrix.matrix().cols());
        if x.len != cols {
            let message = format!(
                "vectors of {} elements for a matrix [{rows}, {cols}]",
                x.len
            );
            return Err(Error::new(ErrorKind::Shape, message));
        }
        let is_of_this_pass = self.results.iter().any(|result| result.is_same(x));
        if !x.is_ready() && !is_of_this_pass {
            let message = "a vector of another pass, which has not finished";
            return Err(Error::new(ErrorKind::Argument, message).hint("call `finish` on it"));
        }
        let gpu = &self.spmv.device;
        let plan = gpu.plan(matrix.matrix(), x.n, x.element, sparse)?;
        let bytes = x.n.checked_mul(rows);
        let bytes = bytes.and_then(|n| n.checked_mul(x.element.size()));
        let bytes = bytes
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, format!("{} x {rows} outputs", x.n)))?;
        let mut dispatches = &plan.dispatches[..];
        let mut new = None;
        let rotated = match matrix.matrix() {
            Matrix::Trellis(m) => {
                let rotation = &m.parts().rotation;
                let known = self
                    .rotated
                    .iter()
                    .find(|(input, known, _)| input.is_same(x) && known == rotation);
                Some(match known {
                    Some((_, _, buffer)) => {
                        // The product only, which is the last call.
                        dispatches = &dispatches[dispatches.len() - 1..];
                        buffer.clone()
                    }
                    None => {
                        let buffer = self.spmv.result(4 * plan.rotated)?;
                        new = Some((x.clone(), rotation.clone(), buffer.clone()));
                        buffer
                    }
                })
            }
            _ => None,
        };
        let vectors = Vectors {
            x: x.buffer.clone(),
            y: self.spmv.result(bytes)?,
            rotated,
        };
        encode(gpu, &matrix.0, dispatches, &vectors, &mut self.encoder)?;
        self.rotated.extend(new);
        self.inputs.push(x.clone());
        let y = MetalVector {
            buffer: vectors.y,
            n: x.n,
            len: rows,
            element: x.element,
            is_ready: Arc::new(AtomicBool::new(false)),
        };
        self.results.push(y.clone());
        Ok(y)
    }

    /// Runs the products and waits for them. Errors (`Io`): those of the device.
    pub fn finish(mut self) -> Result<()> {
        self.end_encoding();
        autoreleasepool(|_| {
            self.commands.commit();
            self.commands.waitUntilCompleted();
            if self.commands.status() == MTLCommandBufferStatus::Completed {
                return Ok(());
            }
            let reason = self.commands.error();
            let reason = reason.map(|e| e.localizedDescription().to_string());
            let reason = reason.unwrap_or_else(|| "it does not say why".to_string());
            let message = format!("the GPU did not finish: {reason}");
            Err(Error::new(ErrorKind::Io, message))
        })?;
        for result in &self.results {
            result.is_ready.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn end_encoding(&mut self) {
        if std::mem::take(&mut self.is_encoding) {
            self.encoder.encoder.endEncoding();
        }
    }
}

impl Drop for MetalPass<'_> {
    fn drop(&mut self) {
        // Metal requires it before an encoder is released.
        self.end_encoding();
    }
}

/// Encoder whose calls run concurrently, except for those that depend on others.
struct Raw {
    encoder: Retained<ProtocolObject<dyn MTLComputeCommandEncoder>>,
    hazards: Hazards,
}

impl Encoder for Raw {
    fn pipeline(&mut self, pipeline: &Pipeline) {
        self.encoder.setComputePipelineState(pipeline);
    }

    fn bytes(&mut self, index: usize, bytes: &[u8]) {
        let start = NonNull::from(bytes).cast::<c_void>();
        // SAFETY: this many bytes, fewer than 4 KiB, are copied.
        unsafe {
            self.encoder
                .setBytes_length_atIndex(start, bytes.len(), index)
        };
    }

    fn buffer(&mut self, index: usize, buffer: &GpuBuffer, is_written: bool) {
        let place = Retained::as_ptr(buffer.raw()).addr();
        self.hazards.bind(place, is_written);
        // SAFETY: the plan binds what the kernel declares at this index, and the offset is inside
        // the buffer.
        unsafe {
            self.encoder
                .setBuffer_offset_atIndex(Some(buffer.raw()), buffer.offset, index)
        };
    }

    fn threadgroup_memory(&mut self, bytes: usize) {
        // SAFETY: as the kernel declares it, a multiple of 16 bytes.
        unsafe { self.encoder.setThreadgroupMemoryLength_atIndex(bytes, 0) };
    }

    fn dispatch(&mut self, threadgroups: MTLSize, threads: MTLSize) {
        if self.hazards.call() {
            self.encoder
                .memoryBarrierWithScope(MTLBarrierScope::Buffers);
        }
        self.encoder
            .dispatchThreadgroups_threadsPerThreadgroup(threadgroups, threads);
    }
}
