//! firebox-data
