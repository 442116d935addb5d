// SPDX-License-Identifier: MIT OR Apache-2.0
//! What softmm's paths cost on the plain half of interleave: `cargo bench -p softmm`.

#![expect(missing_docs, reason = "criterion_group makes a public function")]

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use interleave::MaySleep;
use mmu_notifier::{PAGE_SIZE, Range};
use softmm::{Config, Foll, Machine, Placement, Prot};

const PAGES: u64 = 256;

fn paths(c: &mut Criterion) {
    MaySleep::enter(|cx| {
        let machine = Machine::new(Config { frames: 1024, ..Config::default() });
        let cpu = &machine.cpus()[0];
        let user = machine.new_mm().unwrap();
        let mm = &user;
        let range = Range::new(0x40_0000, PAGES * PAGE_SIZE).unwrap();
        let page = Range::new(range.start(), PAGE_SIZE).unwrap();
        let map = |cx: &mut MaySleep<'_>| mm.mmap(cx, Placement::Fixed(range), Prot::ReadWrite).unwrap();
        map(cx);

        let mut group = c.benchmark_group("softmm");
        group.bench_function("store, TLB hit", |b| b.iter(|| cpu.store(cx, mm, range.start(), 1)));
        group.bench_function("munmap + mmap of 1 page, untouched", |b| {
            b.iter(|| mm.mmap(cx, Placement::Fixed(page), Prot::ReadWrite))
        });
        group.bench_function("munmap + mmap + first store of 1 page", |b| {
            b.iter(|| {
                mm.mmap(cx, Placement::Fixed(page), Prot::ReadWrite).unwrap();
                cpu.store(cx, mm, page.start(), 1)
            })
        });
        group.bench_function("256 first stores, then munmap + mmap", |b| {
            b.iter(|| {
                for addr in (range.start()..range.end()).step_by(PAGE_SIZE as usize) {
                    cpu.store(cx, mm, addr, 1).unwrap();
                }
                map(cx)
            })
        });
        group.bench_function("copy-on-write off the zero page, and its munmap + mmap + load", |b| {
            b.iter(|| {
                mm.mmap(cx, Placement::Fixed(page), Prot::ReadWrite).unwrap();
                cpu.load(cx, mm, page.start()).unwrap();
                cpu.store(cx, mm, page.start(), 1)
            })
        });
        group.bench_function("gup_fast, 1 page", |b| {
            b.iter(|| mm.get_user_pages_fast(cx, cpu, page, Foll::PIN.write()))
        });
        group.bench_function("fork + exit of 256 pages", |b| {
            for addr in (range.start()..range.end()).step_by(PAGE_SIZE as usize) {
                cpu.store(cx, mm, addr, 1).unwrap();
            }
            b.iter(|| mm.fork(cx).unwrap().mmput(cx))
        });
        group.bench_function("a new machine of 16 frames, an mm, a store, exit", |b| {
            b.iter_batched(
                || Config { frames: 16, tables: 8, words_per_page: 1, ..Config::default() },
                |config| {
                    let machine = Machine::new(config);
                    let user = machine.new_mm().unwrap();
                    user.mmap(cx, Placement::Fixed(page), Prot::ReadWrite).unwrap();
                    machine.cpus()[0].store(cx, &user, page.start(), 1).unwrap();
                    user.mmput(cx);
                },
                BatchSize::SmallInput,
            )
        });
        group.finish();
        user.mmput(cx);
    });
}

criterion_group!(benches, paths);
criterion_main!(benches);
