//! firebox
