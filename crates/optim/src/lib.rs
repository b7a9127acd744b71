//! firebox-optim
