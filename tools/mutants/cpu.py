"""Lists faults in the CPU kernels, and in the partition of attention work over blocks."""

from __future__ import annotations

from . import Mutant

CPU, ISA = "csrc/cpu", "csrc/cpu/isa"
# These kernels are compiled per instruction set, here for one.
KERNELS = ("csrc/cpu/isa/baseline.cpp",)


def op(*names: str) -> tuple[str, ...]:
    return tuple(f"csrc/cpu/{name}.cpp" for name in names)


def tests(name: str, *functions: str) -> tuple[str, ...]:
    """Name these tests of an op."""
    file = f"tests/test_{name}.py"
    return tuple(f"{file}::test_{function}" for function in functions)


ROW_BLOCK, ROWS, SLOTS, SOFTMAX, PARTIALS, CHUNK_SUMS, VECTOR_BLOCKS, TILE_BLOCKS = (
    f"{ISA}/attention/{name}.h"
    for name in (
        "row_block", "item_rows", "tree_slots", "softmax", "partial_softmax", "chunk_sums",
        "vector_blocks", "tile_blocks",
    )
)  # fmt: skip

MUTANTS = [
    # ---- tree_attention ----
    Mutant(
        "tree_attention: the first row of a block of rows is left out",
        f"{CPU}/tree_attention.cpp",
        "i.row_begin = int(int64_t(block) * packed / blocks);",
        "i.row_begin = int(int64_t(block) * packed / blocks) + (block > 0);",
        tests("tree_attention", "many_rows"),
        op("tree_attention"),
    ),
    Mutant(
        "tree_attention: tree keys behind a whole segment are forgotten",
        f"{CPU}/tree_attention.cpp",
        "(longest + p.num_tree_keys + kAttentionSegment - 1)",
        "(longest + kAttentionSegment - 1)",
        tests("tree_attention", "prefixes", "trees"),
        op("tree_attention"),
    ),
    Mutant(
        "tree_attention: parts of units of several threads share their place",
        f"{CPU}/tree_attention.cpp",
        "split ? all_partials + unit * unit_partials : nullptr",
        "split ? all_partials : nullptr",
        tests("tree_attention", "threads_do_not_change_bits"),
        op("tree_attention"),
    ),
    Mutant(
        "tree_attention: a window is one short",
        ROW_BLOCK,
        "max_of(0, rows_.position(m) - p_.window + 1)",
        "max_of(0, rows_.position(m) - p_.window + 2)",
        tests("tree_attention", "window"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: a row of a chain does not see itself",
        ROW_BLOCK,
        "max_of(prefix, prefix + m + n - p_.num_rows + 1)",
        "max_of(prefix, prefix + m + n - p_.num_rows)",
        tests("tree_attention", "chain_is_causal_sdpa", "prefixes"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: what was summed before is not rescaled",
        SOFTMAX,
        "const float rescale = max == s.max ? 1.f : simd::exp2(s.max - max);",
        "const float rescale = 1.f;",
        tests("tree_attention", "prefixes"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: segments are added without their weights",
        PARTIALS,
        "state->sum = state->sum * a + part.sum * b;",
        "state->sum = state->sum + part.sum * b;",
        tests("tree_attention", "prefixes", "batch"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: a chunk without weight loses its sum",
        CHUNK_SUMS,
        "if (!any_at_least(sum, kTooSmall)) {",
        "if (!any_at_least(sum, 0.f)) {",
        tests("tree_attention", "chunk_lse_of_chunks_without_weight"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: the first piece of a chunk over blocks is lost",
        CHUNK_SUMS,
        "const int64_t first = c + begin / kBlock,",
        "const int64_t first = c + (begin + kBlock / 2) / kBlock,",
        tests("tree_attention", "chunk_lse"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: the sink of the next head",
        PARTIALS,
        "expf(p.sinks[row % p.num_heads] - lse)",
        "expf(p.sinks[(row + 1) % p.num_heads] - lse)",
        tests("tree_attention", "sinks"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: a softcap of the unscaled logits",
        ROWS,
        "p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2E",
        "p.softcap > 0 ? 1.f / p.softcap : p.scale * kLog2E",
        tests("tree_attention", "softcap"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: masked tree keys at the window's edge",
        SOFTMAX,
        "if (rows_.key_position(slots[j]) < s.begin) in_line",
        "if (rows_.key_position(slots[j]) <= s.begin) in_line",
        tests("tree_attention", "window"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: a key's slot is taken for its depth",
        ROWS,
        "p.k_depths ? p.k_depths[int64_t(item.b) * p.num_tree_keys + slot] : slot",
        "slot",
        tests("tree_attention", "window"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: keys that only some rows see are taken for hidden",
        SLOTS,
        "seen_[w] |= mask_word(rows_.tree_begin + m, w);",
        "seen_[w] = mask_word(rows_.tree_begin + m, w);",
        tests("tree_attention", "trees"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: values that nobody sees count, times 0",
        VECTOR_BLOCKS,
        "block.masked ? slots_.seen() : nullptr",
        "nullptr",
        tests("tree_attention", "masked_keys_may_hold_anything"),
        KERNELS,
    ),
    Mutant(
        "tree_attention: the second word of a mask is the first one's",
        SLOTS,
        "slots[1 + count++] = w * 64 + __builtin_ctzll(word);",
        "slots[1 + count++] = __builtin_ctzll(word);",
        tests("tree_attention", "trees", "rows_and_keys_differ"),
        KERNELS,
    ),
    # ---- the ops on a vocabulary ----
    Mutant(
        "vocab: a NaN is no reason not to draw",
        f"{ISA}/vocab.h",
        "return {best, any(nan)};",
        "return {best, false};",
        tests("sample_nodes", "no_choice"),
        KERNELS,
    ),
    Mutant(
        "vocab: of equal logits the last group's is taken",
        f"{ISA}/vocab.h",
        "if (bits && index < 0) index",
        "if (bits) index",
        tests("sample_nodes", "argmax_takes_the_first_of_equal_logits"),
        KERNELS,
    ),
    Mutant(
        "vocab: what is behind a row counts",
        f"{ISA}/vocab.h",
        "tail[i] = j + i < n ? x[j + i] : minus_infinity(x);",
        "tail[i] = x[j + i];",
        tests("sample_nodes", "argmax"),
        KERNELS,
    ),
    Mutant(
        "vocab: rows of NaN offer nothing",
        f"{ISA}/vocab.h",
        "const bool all = threshold == -INFINITY;",
        "const bool all = false;",
        tests("expand_tree", "nan_and_infinite_logits"),
        KERNELS,
    ),
    Mutant(
        "vocab: a draw of 1 finds no token",
        "csrc/vocab.h",
        "return threshold < below ? threshold : below;",
        "return threshold;",
        tests("sample_nodes", "extreme_uniforms"),
        op("sample_nodes", "verify_tree"),
    ),
    Mutant(
        "sample_nodes: what is before the block is forgotten",
        f"{CPU}/sample_nodes.cpp",
        "block > 0 ? sums[block - 1] : 0.",
        "0.",
        tests("sample_nodes", "draws"),
        op("sample_nodes"),
    ),
    Mutant(
        "sample_nodes: runs of values are not added up",
        f"{CPU}/row_softmax.h",
        "    base += sum;\n",
        "",
        tests("sample_nodes", "draws"),
        op("sample_nodes"),
    ),
    Mutant(
        "expand_tree: a draft's certainty becomes NaN",
        f"{CPU}/expand_tree.cpp",
        "value == max ? 0. : double(value) - double(max)",
        "double(value) - double(max)",
        tests("expand_tree", "nan_and_infinite_logits"),
        op("expand_tree"),
    ),
    Mutant(
        "expand_tree: a node's list ends a candidate early",
        f"{CPU}/expand_tree.cpp",
        "if ((best + 1) % uint32_t(top_k) == 0) {",
        "if ((best + 2) % uint32_t(top_k) == 0) {",
        tests("expand_tree", "random"),
        op("expand_tree"),
    ),
    Mutant(
        "order: -0 comes after 0",
        "csrc/order.h",
        "  x += 0.f;  // -0 becomes 0\n",
        "",
        tests("expand_tree", "ties")
        + tests("select_chunks", "ties_go_to_the_lower_id", "random")
        + ("tests/test_expand_tree.py", "tests/test_select_chunks.py"),
        op("expand_tree", "select_chunks", "finalize_tree"),
    ),
    Mutant(
        "order: NaN is the largest",
        "csrc/order.h",
        "if (x != x) return 0xffffffffu;",
        "if (x != x) return 0;",
        tests("select_chunks", "nan_ranks_below_minus_infinity"),
        op("expand_tree", "select_chunks", "finalize_tree"),
    ),
    # ---- trees ----
    Mutant(
        "verify_tree: the last of repeated siblings",
        f"{CPU}/verify_tree.cpp",
        "for (int node = num_nodes - 1; node > 0; --node) {",
        "for (int node = 1; node < num_nodes; ++node) {",
        tests("verify_tree", "the_first_of_repeated_siblings_is_taken"),
        op("verify_tree"),
    ),
    Mutant(
        "verify_tree: no choice matches padding",
        f"{CPU}/verify_tree.cpp",
        "(tokens[child] != target[node] || target[node] < 0)",
        "tokens[child] != target[node]",
        tests("verify_tree", "no_choice_matches_no_padding"),
        op("verify_tree"),
    ),
    Mutant(
        "verify_tree: the root counts as accepted",
        f"{CPU}/verify_tree.cpp",
        "*num_accepted_ = length_ - 1;",
        "*num_accepted_ = length_;",
        tests("verify_tree", "root_only"),
        op("verify_tree"),
    ),
    Mutant(
        "finalize_tree: a child may be better than its parent",
        f"{CPU}/finalize_tree.cpp",
        "rank.descending_logp = std::max(rank.descending_logp, ranks[parent].descending_logp);",
        "",
        tests("finalize_tree", "a_child_is_bounded_by_its_parent"),
        op("finalize_tree"),
    ),
    Mutant(
        "finalize_tree: ties do not look at depth",
        f"{CPU}/finalize_tree.cpp",
        "rank.depth = ranks[parent].depth + 1;",
        "rank.depth = 1;",
        tests(
            "finalize_tree",
            "random_pools",
            "a_child_of_probability_one_does_not_replace_its_parent",
        ),
        op("finalize_tree"),
    ),
    Mutant(
        "finalize_tree: only the first word of ancestors is handed down",
        f"{CPU}/finalize_tree.cpp",
        "std::copy_n(mask + int64_t(parent) * words, words, row);",
        "std::copy_n(mask + int64_t(parent) * words, 1, row);",
        tests("finalize_tree", "large_pools"),
        op("finalize_tree"),
    ),
    # ---- caches and chunks ----
    Mutant(
        "compact_kv: from the end of the path",
        f"{CPU}/compact_kv.cpp",
        "for (int i = 0; i < count; ++i) {",
        "for (int i = count - 1; i >= 0; --i) {",
        tests("compact_kv", "every_row_moves_onto_one_that_moved"),
        op("compact_kv"),
    ),
    Mutant(
        "compact_kv: the last accepted row stays",
        "csrc/kv_rows.h",
        "accepted < p.path_len ? accepted + 1 : p.path_len",
        "accepted < p.path_len ? accepted : p.path_len",
        tests("compact_kv", "against_index_select"),
        op("compact_kv"),
    ),
    Mutant(
        "compact_kv: a row behind the cache is read",
        "csrc/kv_rows.h",
        "node > i && row < p.capacity ? row : -1",
        "node > i && row <= p.capacity ? row : -1",
        tests("compact_kv", "nothing_outside_is_touched") + ("tests/test_compact_kv.py",),
        op("compact_kv"),
    ),
    Mutant(
        "append_kv: a row behind the cache is written",
        "csrc/kv_rows.h",
        "p.lens[b] < 0 ? 0 : p.capacity - p.lens[b]",
        "p.lens[b] < 0 ? 0 : p.capacity - p.lens[b] + 1",
        tests("append_kv", "rows_that_do_not_fit_are_dropped"),
        op("append_kv"),
    ),
    Mutant(
        "append_kv: rows that lie side by side on one side only are copied as one",
        f"{CPU}/kv_copy.h",
        "return to_stride == bytes && from_stride == bytes;",
        "return to_stride == bytes;",
        tests("append_kv", "layouts", "broadcast_rows"),
        op("append_kv"),
    ),
    Mutant(
        "gather_chunks: the last chunk counts as a whole one",
        "csrc/kv_rows.h",
        "int64_t(count - 1) * p.chunk_size + gather_chunk_length(p, b, count - 1)",
        "int64_t(count) * p.chunk_size",
        tests("gather_chunks", "layouts"),
        op("gather_chunks"),
    ),
    Mutant(
        "gather_chunks: positions begin at 0 instead of ending at the last chunk",
        "csrc/kv_rows.h",
        "if (p.right_aligned) {",
        "if (false) {",
        tests("gather_chunks", "random"),
        op("gather_chunks"),
    ),
    Mutant(
        "gather_chunks: a table of another layer's frequencies",
        f"{CPU}/gather_chunks.cpp",
        "std::memcmp(inv_freq, inv_freq_, cos_.size() * sizeof(float)) == 0",
        "std::memcmp(inv_freq, inv_freq_, cos_.size() / 2 * sizeof(float)) == 0",
        ("tests/test_gather_chunks.py",),
        op("gather_chunks"),
    ),
    Mutant(
        "gather_chunks: the sine's sign in whole registers",
        f"{ISA}/rotate.h",
        "store_key(to_b + i, y * c + x * s);",
        "store_key(to_b + i, y * c - x * s);",
        tests("gather_chunks", "rotary_dims"),
        KERNELS,
    ),
    Mutant(
        "gather_chunks: bf16 ties are rounded up",
        f"{ISA}/rotate.h",
        "(bits + 0x7fff + (bits >> 16 & 1)) >> 16",
        "(bits + 0x8000) >> 16",
        tests("gather_chunks", "ties_round_to_even"),
        KERNELS,
    ),
    Mutant(
        "merge_states: +inf does not mark an empty part",
        "csrc/merge.h",
        "  if (lse_b == INFINITY) lse_b = -INFINITY;\n",
        "",
        tests("merge_states", "empty_parts_are_not_read"),
        op("merge_states"),
    ),
    Mutant(
        "merge_states: a part of weight 0 counts, times 0",
        "csrc/merge.h",
        "(w.b == 0.f ? 0.f : y)",
        "y",
        tests("merge_states", "empty_parts_are_not_read"),
        op("merge_states"),
    ),
    Mutant(
        "chunk_scores: the tree's mass is left out",
        f"{CPU}/chunk_scores.cpp",
        "std::max(std::isfinite(own) ? own : 0., 1. - before)",
        "std::isfinite(own) ? own : 0.",
        tests("chunk_scores", "random"),
        op("chunk_scores"),
    ),
    Mutant(
        "chunk_scores: a chunk that the tree begins in counts as whole",
        f"{CPU}/chunk_scores.cpp",
        "p.tree ? prefix / p.chunk_size :",
        "p.tree ? (prefix + p.chunk_size - 1) / p.chunk_size :",
        tests("chunk_scores", "the_chunk_of_the_first_tree_key", "random"),
        op("chunk_scores"),
    ),
    Mutant(
        "chunk_scores: an infinite chunk counts",
        f"{ISA}/chunk_mass.h",
        "as_floats(as_ints(exp(v.part[i] - bound)) & (v.part[i] < INFINITY))",
        "exp(v.part[i] - bound)",
        ("tests/test_chunk_scores.py",),
        KERNELS,
    ),
    Mutant(
        "select_chunks: the newest chunks are those at the cache's end",
        f"{CPU}/select_chunks.cpp",
        "ids[sinks + free + i] = valid - recent + i;",
        "ids[sinks + free + i] = p.num_chunks - recent + i;",
        tests("select_chunks", "random"),
        op("select_chunks"),
    ),
    Mutant(
        "select_chunks: a chunk that has only begun does not count",
        f"{CPU}/select_chunks.cpp",
        "(len + p.chunk_size - 1) / p.chunk_size",
        "len / p.chunk_size",
        tests("select_chunks", "random"),
        op("select_chunks"),
    ),
    # ---- invariant_linear ----
    Mutant(
        "invariant_linear: rows that are computed together add up from the other end",
        f"{ISA}/invariant_linear.h",
        "add_step(w + s * kStep, w_stride, x + s * kStepFloats, x_stride, sums);",
        "{\n      const int64_t t = kR > 1 ? whole - 1 - s : s;\n"
        "      add_step(w + t * kStep, w_stride, x + t * kStepFloats, x_stride, sums);\n    }",
        tests("invariant_linear", "rows_have_the_bits_that_they_have_alone"),
        KERNELS,
    ),
    Mutant(
        "invariant_linear: columns behind a whole tile are packed from its begin",
        f"{ISA}/invariant_linear.h",
        "for (int64_t k = c < whole_n ? whole_k : 0; k < depth; ++k)",
        "for (int64_t k = whole_k; k < depth; ++k)",
        tests("invariant_linear", "error"),
        KERNELS,
    ),
    Mutant(
        "invariant_linear: the second batch has the first one's rows",
        f"{CPU}/invariant_linear.cpp",
        "x + b * rows * row_floats",
        "x",
        tests("invariant_linear", "batches_have_the_bits_of_their_products"),
        op("invariant_linear"),
    ),
]

# By the emulation of tests/emulation/amx/.
TILES = ("tests/emulation/amx/amx.cpp",)
AMX = [
    Mutant(
        "amx: a tile in which the tree begins is the same for all rows",
        TILE_BLOCKS,
        "block.masked ? block.prefix_keys / kStep",
        "block.masked ? (block.prefix_keys + kStep - 1) / kStep",
        tests("tree_attention", "trees"),
        TILES,
    ),
    Mutant(
        "amx: the values of a row's line are the first of the tree",
        TILE_BLOCKS,
        "rows_.prefix + slots[at - prefix_keys]",
        "rows_.prefix + (at - prefix_keys)",
        tests("tree_attention", "trees"),
        TILES,
    ),
    Mutant(
        "amx: the next group's scores take the place of this one's",
        TILE_BLOCKS,
        "own_.scores[first_row / kGroupRows % 2]",
        "own_.scores[0]",
        tests("tree_attention", "many_rows"),
        TILES,
    ),
    Mutant(
        "amx: nobody releases the tiles",
        TILE_BLOCKS,
        "void end() { _tile_release(); }",
        "void end() {}",
        tests("tree_attention", "prefixes"),
        TILES,
    ),
]

WALK = ("tests/test_work_partition.py",)
PARTITION = [
    Mutant(
        "partition: a last tile that is not full is left out",
        "csrc/work_partition.h",
        "keys.begin < keys.end ? divide_up(keys.end, tile_keys) : begin",
        "keys.begin < keys.end ? keys.end / tile_keys : begin",
        WALK,
    ),
    Mutant(
        "partition: the tile that a window begins in is left out",
        "csrc/work_partition.h",
        "const int64_t begin = keys.begin / tile_keys;",
        "const int64_t begin = divide_up(keys.begin, tile_keys);",
        WALK,
    ),
    Mutant(
        "partition: the line's end belongs to no block",
        "csrc/work_partition.h",
        "const int64_t even = divide_up(total, w.grid);",
        "const int64_t even = total / w.grid;",
        WALK,
    ),
    Mutant(
        "partition: runs are cut shorter than they pay",
        "csrc/work_partition.h",
        "return even > w.min_run ? even : w.min_run;",
        "return even > 1 ? even : 1;",
        WALK,
    ),
    Mutant(
        "partition: a unit without tiles is two blocks'",
        "csrc/work_partition.h",
        "run.begin <= unit_begin && unit_begin < run.end",
        "run.begin <= unit_begin && unit_begin <= run.end",
        WALK,
    ),
    Mutant(
        "partition: a block that has nothing of a unit opens it",
        "csrc/work_partition.h",
        "begin == 0 && end > 0,",
        "begin == 0,",
        WALK,
    ),
    Mutant(
        "partition: the combine looks for a part too many",
        "csrc/work_partition.h",
        "(first + num_tiles - 1) / run + 1};",
        "(first + num_tiles) / run + 1};",
        WALK,
    ),
    Mutant(
        "partition: two parts in one place",
        "csrc/work_partition.h",
        "return block * kPartialsPerBlock + opens;",
        "return block + opens;",
        WALK,
    ),
    Mutant(
        "partition: a unit's overhead is left out of its segments",
        "csrc/work_partition.h",
        "  const int64_t first = unit_begin + kUnitOverhead;\n"
        "  const int64_t begin = clamp_between(run.begin - first, 0, num_tiles);",
        "  const int64_t first = unit_begin;\n"
        "  const int64_t begin = clamp_between(run.begin - first, 0, num_tiles);",
        WALK,
    ),
    Mutant(
        "partition: the grid is that of one sequence",
        "csrc/work_partition.h",
        "units_per_sequence(w) * int64_t(w.batch) * unit_length",
        "units_per_sequence(w) * unit_length",
        WALK,
    ),
    Mutant(
        "partition: more blocks than there is work for",
        "csrc/work_partition.h",
        "int(clamp_between(divide_up(most, w.min_run), 1, max_grid))",
        "int(clamp_between(most, 1, max_grid))",
        WALK,
    ),
]
