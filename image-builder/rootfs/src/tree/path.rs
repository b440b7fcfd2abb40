//! Paths as archives write them, made into names one below the other, or refused.

use crate::{
    error::EntryError,
    limits::{NAME_BYTES_MAX, PATH_BYTES_MAX},
};

const WHITEOUT: &[u8] = b".wh.";

/// What the path of an archive entry points at.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place<'a> {
    Root,
    /// Something in the folder `parents`.
    Name {
        parents: Vec<&'a [u8]>,
        name: &'a [u8],
    },
    /// Says that lower layers' `name` in the folder `parents` is gone.
    Whiteout {
        parents: Vec<&'a [u8]>,
        name: &'a [u8],
    },
    /// Says that all that lower layers have in this folder is gone.
    Opaque {
        folder: Vec<&'a [u8]>,
    },
    /// AUFS' own notes (`.wh..wh.plnk` and the like): no part of the image.
    Bookkeeping,
}

/// Splits a path into names. Leading, double and trailing slashes and `.` mean nothing; `..` is
/// refused rather than resolved, as no honest archiver writes it.
pub(crate) fn components(path: &[u8], depth_max: usize) -> Result<Vec<&[u8]>, EntryError> {
    if path.len() > PATH_BYTES_MAX {
        return Err(EntryError::PathTooLong { bytes: path.len(), max: PATH_BYTES_MAX });
    }
    if path.contains(&0) {
        return Err(EntryError::Nul);
    }
    let mut names = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(EntryError::Climbs),
            _ if name.len() > NAME_BYTES_MAX => {
                return Err(EntryError::NameTooLong { bytes: name.len(), max: NAME_BYTES_MAX });
            }
            _ => names.push(name),
        }
    }
    if names.len() > depth_max { Err(EntryError::TooDeep { max: depth_max }) } else { Ok(names) }
}

/// Reads an entry's path, whiteouts included.
pub(crate) fn place(path: &[u8], depth_max: usize) -> Result<Place<'_>, EntryError> {
    let mut parents = components(path, depth_max)?;
    let Some(name) = parents.pop() else { return Ok(Place::Root) };
    let mut all = parents.iter().copied().chain([name]);
    if all.any(|name| name.starts_with(b".wh..wh.") && name != b".wh..wh..opq") {
        return Ok(Place::Bookkeeping);
    }
    if parents.iter().any(|parent| parent.starts_with(WHITEOUT)) {
        return Err(EntryError::Whiteout);
    }
    Ok(match name.strip_prefix(WHITEOUT) {
        None => Place::Name { parents, name },
        Some(b".wh..opq") => Place::Opaque { folder: parents },
        // `.wh...` and the like would remove the folder itself or its parent.
        Some(b"" | b"." | b"..") => return Err(EntryError::Whiteout),
        Some(name) => Place::Whiteout { parents, name },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPTH: usize = 512;

    #[test]
    fn slashes_and_single_dots_mean_nothing() {
        for path in ["a/b", "/a/b", "./a/b", "a//b/", "///a/././b/."] {
            assert_eq!(
                components(path.as_bytes(), DEPTH),
                Ok(vec![&b"a"[..], &b"b"[..]]),
                "{path}"
            );
        }
        for path in ["", "/", ".", "./", "//./"] {
            assert_eq!(place(path.as_bytes(), DEPTH), Ok(Place::Root), "{path}");
        }
    }

    #[test]
    fn a_path_that_climbs_or_holds_nul_is_refused() {
        for path in ["..", "../../etc/pwn", "a/../b", "a/.."] {
            assert_eq!(components(path.as_bytes(), DEPTH), Err(EntryError::Climbs), "{path}");
        }
        assert_eq!(components(b"a\0b", DEPTH), Err(EntryError::Nul));
    }

    #[test]
    fn lengths_and_depth_have_an_end() {
        let name = [b'n'; 255];
        assert_eq!(components(&name, DEPTH), Ok(vec![&name[..]]));
        let longer = EntryError::NameTooLong { bytes: 256, max: 255 };
        assert_eq!(components(&[b'n'; 256], DEPTH), Err(longer));
        let deep = "d/".repeat(800);
        assert_eq!(components(deep.as_bytes(), 800).map(|names| names.len()), Ok(800));
        assert_eq!(components(deep.as_bytes(), 799), Err(EntryError::TooDeep { max: 799 }));
        let long = "x/".repeat(3000);
        let longer = EntryError::PathTooLong { bytes: 6000, max: 4095 };
        assert_eq!(components(long.as_bytes(), 10_000), Err(longer));
    }

    #[test]
    fn names_need_not_be_text() {
        assert_eq!(components(b"\xff\xfe/\x80", DEPTH), Ok(vec![&b"\xff\xfe"[..], b"\x80"]));
    }

    #[test]
    fn whiteouts_are_told_from_names() {
        let parents = || vec![&b"a"[..]];
        assert_eq!(
            place(b"a/.wh.b", DEPTH),
            Ok(Place::Whiteout { parents: parents(), name: b"b" })
        );
        assert_eq!(place(b"a/.wh..wh..opq", DEPTH), Ok(Place::Opaque { folder: parents() }));
        assert_eq!(place(b".wh..wh.plnk/1.2", DEPTH), Ok(Place::Bookkeeping));
        assert_eq!(place(b".wh..wh.aufs", DEPTH), Ok(Place::Bookkeeping));
        assert_eq!(
            place(b"a/.whale", DEPTH),
            Ok(Place::Name { parents: parents(), name: b".whale" })
        );
    }

    #[test]
    fn a_whiteout_of_nothing_or_of_the_folder_itself_is_refused() {
        for path in ["a/.wh.", "a/.wh..", "a/.wh...", "a/.wh.b/c", ".wh..wh..opq/x"] {
            assert_eq!(place(path.as_bytes(), DEPTH), Err(EntryError::Whiteout), "{path}");
        }
    }
}
