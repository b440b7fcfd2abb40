//! Driver side of queues for device tests.
