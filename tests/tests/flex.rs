//! Training on the flex backend.
#![allow(clippy::unwrap_used)]

use firebox::tensor::device::Backend;

#[test]
fn twenty_steps_on_flex_give_the_losses_of_ndarray() {
    firebox_tests::same_losses_as_ndarray(&Backend::Flex.device().unwrap());
}
