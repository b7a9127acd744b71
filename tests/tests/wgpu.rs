//! Training on a GPU backend, through whatever driver the machine has: in CI a software one.
#![allow(clippy::unwrap_used)]

use firebox::tensor::device::Backend;

#[test]
fn twenty_steps_on_wgpu_give_the_losses_of_ndarray() {
    firebox_tests::same_losses_as_ndarray(&Backend::Wgpu.device().unwrap());
}
