//! Backends and devices: the one place that knows which backends were compiled in.
//!
//! Every other module works on any [`Device`]. A model is made on `device.autodiff()` to be trained, on the plain device to be used.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;

/// A backend that Firebox can run on; which of them a build has is decided by cargo features of the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// CPU, `burn-ndarray` with Firebox's fused operations. The default.
    NdArray,
    /// CPU, `burn-flex` with the same fused operations.
    Flex,
    /// GPU through wgpu with WGSL shaders.
    Wgpu,
    /// GPU through wgpu with SPIR-V shaders (Vulkan).
    Vulkan,
    /// GPU through wgpu on Apple's Metal.
    Metal,
    /// GPU through WebGPU.
    WebGpu,
    /// NVIDIA GPU.
    Cuda,
    /// AMD GPU.
    Rocm,
}

/// Why no device could be given.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// A name that no backend has.
    #[error("unknown backend `{name}`: known are {}", Backend::names())]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// A backend of which this build knows nothing.
    #[error(
        "this build has no backend `{backend}` (it has {available}): build with `--features {backend}`, or run `cargo xtask train --backend {backend}`, which does"
    )]
    NotCompiled {
        /// What was asked for.
        backend: Backend,
        /// What there is.
        available: String,
    },
}

impl Backend {
    /// Every backend, compiled in or not.
    pub const ALL: [Backend; 8] = [
        Backend::NdArray,
        Backend::Flex,
        Backend::Wgpu,
        Backend::Vulkan,
        Backend::Metal,
        Backend::WebGpu,
        Backend::Cuda,
        Backend::Rocm,
    ];

    /// The name, which is also the cargo feature.
    pub fn name(self) -> &'static str {
        match self {
            Backend::NdArray => "ndarray",
            Backend::Flex => "flex",
            Backend::Wgpu => "wgpu",
            Backend::Vulkan => "vulkan",
            Backend::Metal => "metal",
            Backend::WebGpu => "webgpu",
            Backend::Cuda => "cuda",
            Backend::Rocm => "rocm",
        }
    }

    fn names() -> String {
        Self::ALL.map(Backend::name).join(", ")
    }

    /// Whether this build has it.
    pub fn compiled(self) -> bool {
        match self {
            Backend::NdArray => cfg!(feature = "ndarray"),
            Backend::Flex => cfg!(feature = "flex"),
            Backend::Wgpu => cfg!(feature = "wgpu"),
            Backend::Vulkan => cfg!(feature = "vulkan"),
            Backend::Metal => cfg!(feature = "metal"),
            Backend::WebGpu => cfg!(feature = "webgpu"),
            Backend::Cuda => cfg!(feature = "cuda"),
            Backend::Rocm => cfg!(feature = "rocm"),
        }
    }

    /// Its default device, without gradients.
    ///
    /// # Errors
    /// [`DeviceError::NotCompiled`] where this build does not have it.
    pub fn device(self) -> Result<Device, DeviceError> {
        #[allow(unreachable_patterns)]
        match self {
            #[cfg(feature = "ndarray")]
            Backend::NdArray => Ok(Device::ndarray()),
            #[cfg(feature = "flex")]
            Backend::Flex => Ok(Device::flex()),
            #[cfg(feature = "wgpu")]
            Backend::Wgpu => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "vulkan")]
            Backend::Vulkan => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "metal")]
            Backend::Metal => Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "webgpu")]
            Backend::WebGpu => Ok(Device::webgpu(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "cuda")]
            Backend::Cuda => Ok(Device::cuda(0)),
            #[cfg(feature = "rocm")]
            Backend::Rocm => Ok(Device::rocm(0)),
            _ => Err(DeviceError::NotCompiled {
                backend: self,
                available: Self::ALL
                    .into_iter()
                    .filter(|b| b.compiled())
                    .map(Backend::name)
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        Self::ALL.into_iter().find(|b| b.name() == name).ok_or_else(|| DeviceError::Unknown { name: name.to_string() })
    }
}

/// Whether the fused operations run on `device` (the CPU backends); elsewhere each is composed of burn's own.
pub fn is_fused(device: &Device) -> bool {
    use burn::backend::DispatchDevice;
    let device = device.clone().without_autodiff();
    #[allow(unreachable_patterns)]
    match device.as_dispatch() {
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_round_trip_and_errors_say_what_to_do() {
        for backend in Backend::ALL {
            assert_eq!(backend.name().parse::<Backend>().unwrap(), backend);
            match backend.device() {
                Ok(device) => assert!(backend.compiled() && !device.is_autodiff()),
                Err(error) => assert!(error.to_string().contains(&format!("--features {backend}"))),
            }
        }
        let error = "numpy".parse::<Backend>().unwrap_err().to_string();
        assert!(error.contains("numpy") && error.contains("ndarray"), "{error}");
    }
}
