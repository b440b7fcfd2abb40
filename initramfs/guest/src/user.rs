//! Who a command runs as: the user forms of an OCI image config, looked up in the sandbox's own
//! `/etc/passwd` and `/etc/group`.
//!
//! The C library's lookup is not used: a static binary would load the guest's own plug-ins.

use holdfast_wire::guest::Failure;

use crate::failure::{invalid, not_found};

/// Lines looked at in one database: a hostile one must not keep PID 1 busy.
const LINES_MAX: usize = 65_536;

/// Supplementary groups of one user: the kernel's own limit.
const GROUPS_MAX: usize = 65_536;

/// A user as the kernel wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// The text of the two databases. Missing files are empty ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Databases {
    pub passwd: Vec<u8>,
    pub group: Vec<u8>,
}

struct PasswdEntry<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

struct GroupEntry<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

impl User {
    /// `user`, `uid`, `user:group`, `uid:gid`, either half by name or number; empty is root. A
    /// number needs no entry. With a group named, the user's other groups are left out, as
    /// container runtimes do.
    pub(crate) fn resolve(spec: &str, databases: &Databases) -> Result<Self, Failure> {
        let (user, group) = match spec.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (spec, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let entry = databases
            .passwd_entries()
            .find(|entry| entry.name == user.as_bytes() || number(user) == Some(entry.uid));
        let (uid, mut gid, home) = match (&entry, number(user)) {
            (Some(entry), _) => (entry.uid, entry.gid, text(entry.home)),
            (None, Some(uid)) => (uid, 0, None),
            (None, None) => {
                return Err(not_found(format!(
                    "user {user:?} is not in the sandbox's /etc/passwd"
                )));
            }
        };
        let mut groups = Vec::new();
        match (group, &entry) {
            (Some(group), _) => gid = databases.group_id(group)?,
            (None, Some(entry)) => groups = databases.groups_of(entry.name),
            (None, None) => {}
        }
        // All ones means "leave as it is" to the kernel: the command would stay root.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(invalid(format!("user {spec:?} is over the largest id, 4294967294")));
        }
        let home = home.unwrap_or_else(|| if uid == 0 { "/root" } else { "/" }.to_owned());
        Ok(Self { uid, gid, groups, home })
    }
}

impl Databases {
    fn passwd_entries(&self) -> impl Iterator<Item = PasswdEntry<'_>> {
        lines(&self.passwd).filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b':');
            let name = fields.next()?;
            let (uid, gid) = (fields.nth(1)?, fields.next()?);
            let home = fields.nth(1).unwrap_or_default();
            let (uid, gid) = (number_of(uid)?, number_of(gid)?);
            Some(PasswdEntry { name, uid, gid, home })
        })
    }

    fn group_entries(&self) -> impl Iterator<Item = GroupEntry<'_>> {
        lines(&self.group).filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b':');
            let name = fields.next()?;
            let gid = number_of(fields.nth(1)?)?;
            Some(GroupEntry { name, gid, members: fields.next().unwrap_or_default() })
        })
    }

    fn group_id(&self, group: &str) -> Result<u32, Failure> {
        self.group_entries()
            .find(|entry| entry.name == group.as_bytes())
            .map(|entry| entry.gid)
            .or_else(|| number(group))
            .ok_or_else(|| not_found(format!("group {group:?} is not in the sandbox's /etc/group")))
    }

    fn groups_of(&self, user: &[u8]) -> Vec<u32> {
        self.group_entries()
            .filter(|entry| entry.members.split(|&byte| byte == b',').any(|name| name == user))
            .map(|entry| entry.gid)
            .take(GROUPS_MAX)
            .collect()
    }
}

fn lines(database: &[u8]) -> impl Iterator<Item = &[u8]> {
    database.split(|&byte| byte == b'\n').take(LINES_MAX).filter(|line| !line.is_empty())
}

fn text(field: &[u8]) -> Option<String> {
    String::from_utf8(field.to_vec()).ok().filter(|text| text.starts_with('/'))
}

fn number_of(field: &[u8]) -> Option<u32> {
    number(str::from_utf8(field).ok()?)
}

/// Digits only: `+5`, which Rust would parse, is a name.
fn number(text: &str) -> Option<u32> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use holdfast_wire::guest::FailureKind;

    use super::*;

    fn databases() -> Databases {
        Databases {
            passwd: b"root:x:0:0:root:/root:/bin/bash\n\
                      broken line\n\
                      web:x:33:33:www:/var/www:/usr/sbin/nologin\n\
                      big:x:4294967295:5::/home/big:\n"
                .to_vec(),
            group: b"root:x:0:\nwww-data:x:33:\naudio:x:29:web,other\nvideo:x:44:other,web\n"
                .to_vec(),
        }
    }

    fn user(spec: &str) -> Result<User, Failure> {
        User::resolve(spec, &databases())
    }

    #[test]
    fn an_empty_user_is_root_with_roots_home() {
        let root = User { uid: 0, gid: 0, groups: vec![], home: "/root".to_owned() };
        assert_eq!(user(""), Ok(root.clone()));
        assert_eq!(User::resolve("", &Databases::default()), Ok(root));
    }

    #[test]
    fn a_name_brings_its_group_its_home_and_its_other_groups() {
        let web = User { uid: 33, gid: 33, groups: vec![29, 44], home: "/var/www".to_owned() };
        assert_eq!(user("web"), Ok(web.clone()));
        assert_eq!(user("33"), Ok(web));
    }

    #[test]
    fn a_named_group_replaces_all_groups() {
        let found = user("web:video").unwrap();
        assert_eq!((found.uid, found.gid, found.groups), (33, 44, vec![]));
        assert_eq!(user("web:7").unwrap().gid, 7);
    }

    #[test]
    fn a_number_needs_no_entry() {
        let nobody = User { uid: 1234, gid: 0, groups: vec![], home: "/".to_owned() };
        assert_eq!(user("1234"), Ok(nobody));
        assert_eq!(user("3000000000:3000000001").unwrap().gid, 3_000_000_001);
    }

    #[test]
    fn an_unknown_name_is_not_found_and_names_itself() {
        for spec in ["nope", "web:nope", "+5", "-1"] {
            let refused = user(spec).unwrap_err();
            assert_eq!(refused.kind, FailureKind::NotFound, "{spec}");
            assert!(refused.message.contains(spec.trim_start_matches("web:")), "{refused:?}");
        }
    }

    #[test]
    fn the_id_that_means_unchanged_is_refused() {
        for spec in ["4294967295", "big", "0:4294967295"] {
            assert_eq!(user(spec).unwrap_err().kind, FailureKind::Invalid, "{spec}");
        }
    }
}
