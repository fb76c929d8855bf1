//! Models by name: `user/model` from the Hugging Face Hub, and the caches on this machine.
//!
//! ```no_run
//! # fn main() -> upg_kernel::Result<()> {
//! use upg_hub::{Hub, ModelName};
//!
//! let name: ModelName = "HuggingFaceTB/SmolLM2-135M-Instruct".parse()?;
//! let hub = Hub::from_env()?;
//! let model = match hub.cached(&name)? {
//!     Some(model) => model,
//!     None => hub.pull(&hub.look_up(&name)?, &())?,
//! };
//! println!("{}", model.path.display());
//! # Ok(())
//! # }
//! ```
//!
//! # Modules
//!
//! Each module uses only the ones above it:
//!
//! - `name`: the names of models, checked.
//! - `settings`: the environment variables of `huggingface_hub`.
//! - `cache`: the cache of originals, in the layout of `huggingface_hub`, which shares it.
//! - `compressed`: the cache of compressed files.
//! - `select`: the files of a repository that a model needs.
//! - `http`: requests with redirects, retries and bounded answers.
//! - `download`: one file into the cache, resumed and checked.
//! - `hub`: [`Hub`], all of it together.
//!
//! Nothing is executed, and no pickle is downloaded. Names of files that a server sends are checked
//! before they become paths.
#![forbid(unsafe_code)]

mod cache;
mod compressed;
mod download;
mod http;
mod hub;
mod name;
mod select;
mod settings;

pub use cache::{Cache, CachedModel, CachedRepository};
pub use compressed::{CompressedCache, CompressedFile, Origin};
pub use download::Progress;
pub use hub::{Hub, Listing};
pub use name::ModelName;
pub use select::{FileEntry, Weights};
pub use settings::Settings;
