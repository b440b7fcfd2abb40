//! Whole-system tests; the programs beside this file hold them.
