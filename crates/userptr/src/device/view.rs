// SPDX-License-Identifier: MIT OR Apache-2.0
//! Does a device see what the program sees? The question of an audit
//! ([`Options::audit`](crate::cache::Options::audit)); no protocol rests on the answer.

/// The answer of [`Device::view`](super::Device::view). Of a moment of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum View {
    /// What the program sees.
    Same,
    /// Something else.
    Other {
        /// The first address of which this is so: of a byte, or of its page.
        at: u64,
    },
    /// Nobody can tell now.
    Unknown {
        /// Why.
        why: &'static str,
    },
}

/// Looks until bytes count as different. Of memory that is written meanwhile two looks differ by themselves.
const LOOKS: usize = 16;

/// The first byte of which device and program see different values, of `len` at which `look` looks at once: first the
/// device, then the program.
///
/// Only a byte that the device shows unchanged at every look, and the program never so, counts: of memory that is the
/// same for both and is written by somebody, one of them would be false at some look.
pub(super) fn differs<E>(
    len: usize,
    mut look: impl FnMut(&mut [u8], &mut [u8]) -> Result<(), E>,
) -> Result<Option<usize>, E> {
    let (mut device, mut program) = (vec![0; len], vec![0; len]);
    look(&mut device, &mut program)?;
    if device == program {
        return Ok(None);
    }
    let first = device.clone();
    let mut suspects: Vec<usize> = (0..len).filter(|&n| device[n] != program[n]).collect();
    for _ in 1..LOOKS {
        look(&mut device, &mut program)?;
        suspects.retain(|&n| device[n] == first[n] && program[n] != first[n]);
        if suspects.is_empty() {
            return Ok(None);
        }
    }
    Ok(suspects.first().copied())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// What is found of four bytes, of which the program's look comes after `step` has been.
    fn found(
        mut device: [u8; 4],
        mut program: [u8; 4],
        step: impl Fn(&mut [u8; 4], &mut [u8; 4]),
    ) -> Option<usize> {
        let Ok::<_, Infallible>(found) = differs(4, |d, p| {
            d.copy_from_slice(&device);
            step(&mut device, &mut program);
            p.copy_from_slice(&program);
            Ok(())
        });
        found
    }

    #[test]
    fn other_bytes_are_found_also_where_the_program_goes_on_writing() {
        assert_eq!(found([1, 2, 3, 4], [1, 2, 3, 4], |_, _| ()), None);
        assert_eq!(found([1, 2, 0, 4], [1, 2, 3, 4], |_, _| ()), Some(2));
        assert_eq!(found([1, 2, 0, 4], [1, 2, 3, 4], |_, p| p[3] += 1), Some(2));
    }

    #[test]
    fn memory_that_both_see_change_is_the_same() {
        let counter = |d: &mut [u8; 4], p: &mut [u8; 4]| {
            p[1] += 1;
            *d = *p;
        };
        assert_eq!(found([1, 2, 3, 4], [1, 2, 3, 4], counter), None);
    }
}
