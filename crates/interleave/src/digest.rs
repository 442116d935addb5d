// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hashes of values, by which an explorer recognises a state that it has been in.
//!
//! A digest depends on the value alone: not on addresses, not on time, not on the order of a hash map.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A value that can be hashed the same way in every run.
pub trait Digest {
    /// The hash.
    fn digest(&self) -> u64;
}

/// Adds a hash to a hash; the order matters.
pub fn mix(hash: u64, with: u64) -> u64 {
    let product = u128::from(hash ^ 0x9e37_79b9_7f4a_7c15) * u128::from(with ^ 0xd1b5_4a32_d192_ed03);
    (product as u64) ^ ((product >> 64) as u64) ^ hash.rotate_left(23)
}

fn sequence<'a, T: Digest + 'a>(items: impl ExactSizeIterator<Item = &'a T>) -> u64 {
    let len = items.len() as u64;
    items.fold(mix(0, len), |hash, item| mix(hash, item.digest()))
}

macro_rules! ints {
    ($($t:ty),*) => {$(
        impl Digest for $t {
            fn digest(&self) -> u64 {
                mix(size_of::<$t>() as u64, *self as u64)
            }
        }
    )*};
}
ints!(u8, u16, u32, u64, usize, i8, i16, i32, i64, isize, bool, char);

impl Digest for () {
    fn digest(&self) -> u64 {
        0
    }
}

impl Digest for str {
    fn digest(&self) -> u64 {
        self.as_bytes().digest()
    }
}

impl Digest for String {
    fn digest(&self) -> u64 {
        self.as_str().digest()
    }
}

impl<T: Digest + ?Sized> Digest for &T {
    fn digest(&self) -> u64 {
        (**self).digest()
    }
}

impl<T: Digest + ?Sized> Digest for Box<T> {
    fn digest(&self) -> u64 {
        (**self).digest()
    }
}

impl<T: Digest> Digest for Option<T> {
    fn digest(&self) -> u64 {
        self.as_ref().map_or(1, |v| mix(2, v.digest()))
    }
}

impl<T: Digest> Digest for [T] {
    fn digest(&self) -> u64 {
        sequence(self.iter())
    }
}

impl<T: Digest, const N: usize> Digest for [T; N] {
    fn digest(&self) -> u64 {
        sequence(self.iter())
    }
}

impl<T: Digest> Digest for Vec<T> {
    fn digest(&self) -> u64 {
        sequence(self.iter())
    }
}

impl<T: Digest> Digest for VecDeque<T> {
    fn digest(&self) -> u64 {
        sequence(self.iter())
    }
}

impl<T: Digest> Digest for BTreeSet<T> {
    fn digest(&self) -> u64 {
        sequence(self.iter())
    }
}

impl<K: Digest, V: Digest> Digest for BTreeMap<K, V> {
    fn digest(&self) -> u64 {
        self.iter().fold(mix(0, self.len() as u64), |hash, (k, v)| mix(mix(hash, k.digest()), v.digest()))
    }
}

macro_rules! tuples {
    ($(($($t:ident . $i:tt),+))*) => {$(
        impl<$($t: Digest),+> Digest for ($($t,)+) {
            fn digest(&self) -> u64 {
                let hash = 3;
                $(let hash = mix(hash, self.$i.digest());)+
                hash
            }
        }
    )*};
}
tuples! { (A.0) (A.0, B.1) (A.0, B.1, C.2) (A.0, B.1, C.2, D.3) (A.0, B.1, C.2, D.3, E.4) (A.0, B.1, C.2, D.3, E.4, F.5) }
