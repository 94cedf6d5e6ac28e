//! POSIX ACLs as attributes have them (kernel: include/uapi/linux/posix_acl_xattr.h).

const VERSION: [u8; 4] = 2_u32.to_le_bytes();
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// What a well-formed ACL says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Acl {
    /// The permission bits that belong to it.
    pub mode: u16,
    /// Whether these are all it says.
    pub is_mode: bool,
}

/// Reads an ACL as the kernel does (fs/posix_acl.c, `posix_acl_valid`): `None` of what it would
/// refuse, `Some(None)` of one without entries, which is the same as none.
pub(super) fn read(value: &[u8]) -> Option<Option<Acl>> {
    let (entries, rest) = value.strip_prefix(&VERSION)?.as_chunks::<8>();
    if !rest.is_empty() {
        return None;
    }
    let (mut mode, mut last, mut named) = (0, 0, false);
    let mut masked = false;
    for entry in entries {
        let [t0, t1, p0, p1, ..] = *entry;
        let (tag, permissions) = (u16::from_le_bytes([t0, t1]), u16::from_le_bytes([p0, p1]));
        // In the order of their numbers, of which only users and groups come again.
        let again = matches!(tag, USER | GROUP) && tag == last;
        let follows = match tag {
            USER_OBJ => last == 0,
            USER => last == USER_OBJ || again,
            GROUP_OBJ => matches!(last, USER_OBJ | USER),
            GROUP => last == GROUP_OBJ || again,
            MASK => matches!(last, GROUP_OBJ | GROUP),
            OTHER => matches!(last, GROUP_OBJ | GROUP | MASK),
            _ => false,
        };
        if !follows || permissions > 7 {
            return None;
        }
        match tag {
            USER_OBJ => mode |= permissions << 6,
            GROUP_OBJ => mode |= permissions << 3,
            MASK => mode = mode & !0o070 | permissions << 3,
            OTHER => mode |= permissions,
            _ => named = true,
        }
        masked |= tag == MASK;
        last = tag;
    }
    match last {
        0 => Some(None),
        OTHER if masked || !named => Some(Some(Acl {
            mode,
            is_mode: !masked && !named,
        })),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16)]) -> Vec<u8> {
        let mut value = VERSION.to_vec();
        for (tag, permissions) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend([0; 4]);
        }
        value
    }

    #[test]
    fn a_mask_takes_the_place_of_the_groups_bits() {
        let plain = acl(&[(USER_OBJ, 7), (GROUP_OBJ, 5), (OTHER, 4)]);
        let mode = |mode, is_mode| Some(Some(Acl { mode, is_mode }));
        assert_eq!(read(&plain), mode(0o754, true));
        let named = [
            (USER_OBJ, 7),
            (USER, 6),
            (USER, 1),
            (GROUP_OBJ, 5),
            (GROUP, 7),
        ];
        let named = acl(&[&named[..], &[(MASK, 6), (OTHER, 0)]].concat());
        assert_eq!(read(&named), mode(0o760, false));
        assert_eq!(read(&acl(&[])), Some(None));
    }

    #[test]
    fn what_the_kernel_would_refuse_is_none() {
        for entries in [
            &[(USER_OBJ, 7), (GROUP_OBJ, 5)][..],
            &[(GROUP_OBJ, 5), (USER_OBJ, 7), (OTHER, 0)],
            &[(USER_OBJ, 7), (USER, 7), (GROUP_OBJ, 5), (OTHER, 0)],
            &[(USER_OBJ, 8), (GROUP_OBJ, 5), (OTHER, 0)],
            &[(USER_OBJ, 7), (GROUP_OBJ, 5), (OTHER, 0), (OTHER, 0)],
            &[(0xffff, 7)],
        ] {
            assert_eq!(read(&acl(entries)), None, "{entries:?}");
        }
        assert_eq!(read(b""), None);
        assert_eq!(read(&[&acl(&[])[..], &[0; 7]].concat()), None);
    }
}
