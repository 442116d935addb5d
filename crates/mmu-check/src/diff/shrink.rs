// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a script that shows a difference short: delta debugging (drop ever smaller pieces while the difference stays).

/// The shortest part of `script` found that still `fails`. `script` itself must. Asks at most `tries` times.
pub fn shrink<T: Clone, E>(
    mut script: Vec<T>,
    mut tries: usize,
    mut fails: impl FnMut(&[T]) -> Result<bool, E>,
) -> Result<Vec<T>, E> {
    let mut piece = script.len().div_ceil(2);
    while piece > 0 {
        let mut at = 0;
        let mut dropped = false;
        while at < script.len() {
            if tries == 0 {
                return Ok(script);
            }
            tries -= 1;
            let end = (at + piece).min(script.len());
            let part = [&script[..at], &script[end..]].concat();
            if !part.is_empty() && fails(&part)? {
                script = part;
                dropped = true;
            } else {
                at = end;
            }
        }
        // Once more at the same size: what could not go before may go now.
        piece = if dropped && piece == 1 { 1 } else { piece / 2 };
    }
    Ok(script)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_matters_is_left_and_nothing_else() {
        let script: Vec<u32> = (0..100).collect();
        let needs = |part: &[u32]| Ok::<_, ()>([17, 18, 93].iter().all(|n| part.contains(n)));
        assert_eq!(shrink(script, 1000, needs), Ok(vec![17, 18, 93]));
    }

    #[test]
    fn it_gives_up_in_time_and_passes_errors_on() {
        let mut asked = 0;
        let left = shrink((0..64).collect::<Vec<u32>>(), 5, |part| {
            asked += 1;
            Ok::<_, ()>(part.contains(&3))
        });
        assert!(left.is_ok_and(|left| left.contains(&3)) && asked == 5);
        assert_eq!(shrink(vec![1, 2], 10, |_| Err::<bool, _>("no kernel")), Err("no kernel"));
    }
}
