// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hashes of values, by which an explorer recognises a state that it has been in.
//!
//! A digest depends on the value alone: not on addresses, not on time, not on the order of a hash map.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

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

impl<T: Digest + ?Sized> Digest for Arc<T> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_values_differ_and_equal_ones_do_not() {
        let digests = [
            vec![0u64, 1].digest(),
            vec![1u64, 0].digest(),
            vec![0u64, 1, 0].digest(),
            vec![0u32, 1].digest(),
            (0u64, 1u64).digest(),
            (1u64, 0u64).digest(),
            Some(0u64).digest(),
            None::<u64>.digest(),
            0u64.digest(),
            0u32.digest(),
            "ab".digest(),
            vec![Some(1u8), None].digest(),
            vec![None, Some(1u8)].digest(),
            BTreeMap::from([(1u64, 2u64)]).digest(),
            BTreeMap::from([(2u64, 1u64)]).digest(),
            Vec::<u64>::new().digest(),
        ];
        let distinct: BTreeSet<u64> = digests.into_iter().collect();
        assert_eq!(distinct.len(), digests.len());
        assert_eq!(BTreeMap::from([(1, 2), (3, 4)]).digest(), BTreeMap::from([(3, 4), (1, 2)]).digest());
        assert_eq!("ab".digest(), String::from("ab").digest());
        assert_eq!([1u8, 2].digest(), vec![1u8, 2].digest());
    }

    #[test]
    fn small_integers_do_not_collide_in_pairs() {
        let all: BTreeSet<u64> =
            (0..300u64).flat_map(|a| (0..300u64).map(move |b| (a, b).digest())).collect();
        assert_eq!(all.len(), 300 * 300);
    }
}
