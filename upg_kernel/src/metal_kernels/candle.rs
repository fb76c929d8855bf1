//! Products on candle's Metal device, among its own operations.

use super::gpu::{Encoder, Gpu, GpuBuffer, Pipeline, Resident, Vectors, encode};
use super::plan::{Element, SparseKernel};
use crate::error::{Error, ErrorKind, Result};
use crate::matrix::Matrix;
use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, MetalDevice, MetalStorage};
use candle_metal_kernels::metal::{Buffer, ComputeCommandEncoder, ComputePipeline};
use objc2::Message;
use objc2_metal::{MTLDevice, MTLSize};
use std::sync::{Arc, Mutex, PoisonError};

/// Values by the registry number of their device.
type ByDevice<T> = Mutex<Vec<(u64, Arc<T>)>>;

/// Device of each number with its compiled kernels, shared by all layers of all models.
static GPUS: ByDevice<Gpu> = Mutex::new(Vec::new());

/// Returns the value for the device, and creates it if necessary;
/// other callers wait meanwhile.
fn of_device<T>(
    all: &ByDevice<T>,
    device: u64,
    make: impl FnOnce() -> Result<T>,
) -> Result<Arc<T>> {
    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, known)) = all.iter().find(|(known, _)| *known == device) {
        return Ok(Arc::clone(known));
    }
    let made = Arc::new(make()?);
    all.push((device, Arc::clone(&made)));
    Ok(made)
}

/// Matrix on the devices that it was multiplied on.
#[derive(Default)]
pub(crate) struct OnMetal(ByDevice<Resident>);

impl std::fmt::Debug for OnMetal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let devices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        write!(f, "OnMetal({} devices)", devices.len())
    }
}

impl OnMetal {
    /// Computes `W x` for each of the consecutive vectors that `layout` describes in `x`.
    ///
    /// Returns `[vectors, rows]` of the same type. Errors: `Unsupported` for a type other than F32
    /// and F16, and those of [`Gpu`] and of candle.
    pub fn product(
        &self,
        matrix: &Matrix,
        x: &MetalStorage,
        layout: &Layout,
    ) -> Result<MetalStorage> {
        let element = match x.dtype() {
            DType::F32 => Element::F32,
            DType::F16 => Element::F16,
            other => {
                let message = format!("a product with {other:?} on Metal, expected F32 or F16");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        };
        let device = x.device();
        let raw = device.device().as_ref();
        let number = raw.registryID();
        let gpu = of_device(&GPUS, number, || Gpu::new(raw.retain()))?;
        let resident = of_device(&self.0, number, || Resident::new(&gpu, matrix))?;
        let matrix = resident.matrix();
        let vectors = layout.shape().elem_count() / matrix.cols();
        let plan = gpu.plan(matrix, vectors, element, SparseKernel::default())?;
        let outputs = vectors * matrix.rows();
        let y = device.new_buffer(outputs, x.dtype(), "upg_product")?;
        let rotated = match plan.rotated {
            0 => None,
            n => Some(device.new_buffer(n, DType::F32, "upg_rotated")?),
        };
        let buffers = Vectors {
            x: shared(x.buffer(), layout.start_offset() * element.size()),
            y: shared(&y, 0),
            rotated: rotated.as_deref().map(|buffer| shared(buffer, 0)),
        };
        run(device, &gpu, &resident, &plan, &buffers)?;
        Ok(MetalStorage::new(y, device.clone(), outputs, x.dtype()))
    }
}

fn run(
    device: &MetalDevice,
    gpu: &Gpu,
    resident: &Resident,
    plan: &super::Plan<'_>,
    buffers: &Vectors,
) -> Result<()> {
    let encoder = device.command_encoder()?;
    let mut encoder = Candle(encoder.as_ref());
    encode(gpu, resident, &plan.dispatches, buffers, &mut encoder)?;
    // It stays in the encoder, and candle's kernels may allocate as much.
    encoder.threadgroup_memory(16);
    Ok(())
}

fn shared(buffer: &Buffer, offset: usize) -> GpuBuffer {
    GpuBuffer::of(buffer.as_ref().retain(), offset)
}

/// Encoder of candle, which inserts barriers between calls according
/// to what they read and write.
struct Candle<'a>(&'a ComputeCommandEncoder);

impl Encoder for Candle<'_> {
    fn pipeline(&mut self, pipeline: &Pipeline) {
        self.0
            .set_compute_pipeline_state(&ComputePipeline::new(pipeline.clone()));
    }

    fn bytes(&mut self, index: usize, bytes: &[u8]) {
        self.0
            .set_bytes_directly(index, bytes.len(), bytes.as_ptr().cast());
    }

    fn buffer(&mut self, index: usize, buffer: &GpuBuffer, is_written: bool) {
        let raw = Buffer::new(buffer.raw().clone());
        match is_written {
            true => self.0.set_output_buffer(index, Some(&raw), buffer.offset),
            false => self.0.set_input_buffer(index, Some(&raw), buffer.offset),
        }
    }

    fn threadgroup_memory(&mut self, bytes: usize) {
        self.0.set_threadgroup_memory_length(0, bytes);
    }

    fn dispatch(&mut self, threadgroups: MTLSize, threads: MTLSize) {
        self.0.dispatch_thread_groups(threadgroups, threads);
    }
}
