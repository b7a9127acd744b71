//! What watches a run.
