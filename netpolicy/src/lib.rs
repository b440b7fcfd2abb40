//! Egress policy as data. In this release there is one policy: nothing leaves.
