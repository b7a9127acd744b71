//! firebox-tensor
