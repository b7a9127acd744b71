//! Training on the optional backends: wgpu through whatever driver the machine has (in CI a software one), and flex, which shares its build.
#![allow(clippy::unwrap_used)]

use firebox::tensor::device::Backend;

#[test]
fn twenty_steps_on_wgpu_give_the_losses_of_ndarray() {
    firebox_tests::same_losses_as_ndarray(&Backend::Wgpu.device().unwrap());
}

#[test]
fn twenty_steps_on_flex_give_the_losses_of_ndarray() {
    firebox_tests::same_losses_as_ndarray(&Backend::Flex.device().unwrap());
}
