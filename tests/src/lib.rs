//! firebox-tests
