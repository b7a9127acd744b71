//! firebox-models
