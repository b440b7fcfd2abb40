//! Admission of CPU, memory and disk on one node.
