//! The public HTTP contract: bodies, error body, state names, conversion to model.
