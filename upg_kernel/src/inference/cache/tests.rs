use super::*;

/// Layout with 3 layers, the middle one with a window, and 2 key/value heads of 2.
fn layout(window: usize, cache_type: CacheType) -> CacheLayout {
    let json = r#"{"model_type": "llama", "vocab_size": 9, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64}"#;
    let mut config = ModelConfig::from_json(json, None).unwrap();
    config.windows[1] = Some(window);
    CacheLayout::new(&config, cache_type)
}

fn pool(window: usize, max_bytes: Option<usize>) -> BlockPool {
    BlockPool::new(Arc::new(layout(window, CacheType::F32)), max_bytes).unwrap()
}

/// Appends `n` positions, at most `chunk` at a time.
fn append(tables: &mut BlockTables, pool: &BlockPool, n: usize, chunk: usize) -> Result<Pass> {
    let mut pass = Pass::default();
    tables.reserve(pool, n, (64, chunk), &mut pass)?;
    tables.commit(n);
    Ok(pass)
}

#[test]
fn layers_that_see_alike_share_a_table() {
    let layout = layout(5, CacheType::F32);
    assert_eq!(layout.layers, [(0, 0), (1, 0), (0, 1)]);
    assert_eq!(layout.groups[0].layers, 2);
    // 16 positions of 2 layers with 2 heads of 2, keys and values.
    assert_eq!(layout.block_values(0), Some(16 * 2 * 2 * 2 * 2));
}

#[test]
fn a_window_bounds_what_is_kept_and_gives_back_nothing_that_is_seen() {
    let (window, chunk) = (5, 3);
    let pool = pool(window, None);
    let mut tables = BlockTables::new(&pool);
    for round in 0..27 {
        let n = [1, 3, 2, 3, 3, 1][round % 6];
        let first = tables.len();
        let pass = append(&mut tables, &pool, n, chunk).unwrap();
        for (group, window) in [(0, 64), (1, window)] {
            let view = &pass.views[group];
            assert!(view.first <= (first + 1).saturating_sub(window));
            assert!(view.first + view.blocks.len() * BLOCK >= first + n);
        }
        // Visible and new positions, and those in the same block as the first visible one.
        assert!(pass.views[1].blocks.len() <= 2);
    }
    assert_eq!(tables.len(), 58);
    // 64 positions in two layers, 32 in one; 2 heads of 2, keys and values.
    for (cache_type, position) in [
        (CacheType::F32, 2 * 2 * 2 * 4),
        (CacheType::F16, 2 * 2 * 2 * 2),
        (CacheType::Int8, 2 * 2 * (2 + 4)),
    ] {
        let layout = layout(window, cache_type);
        let bytes = layout.sequence_bytes(64, chunk).unwrap();
        assert_eq!(bytes, (64 + 32 + 64) * position);
    }
}

#[test]
fn cutting_back_behind_the_window_gives_back_everything() {
    let pool = pool(5, None);
    let mut tables = BlockTables::new(&pool);
    for _ in 0..20 {
        append(&mut tables, &pool, 3, 3).unwrap();
    }
    tables.truncate(60);
    assert_eq!(tables.len(), 60);
    let first = tables.tables[1].first;
    assert!(first >= BLOCK);
    // The query at `first + 4` still sees from `first` on.
    tables.truncate(first + 4);
    assert_eq!(tables.len(), first + 4);
    tables.truncate(first + 3);
    assert_eq!((tables.len(), pool.used_bytes()), (0, 0));
    append(&mut tables, &pool, 3, 3).unwrap();
    assert_eq!(tables.tables[1].first, 0);
}

#[test]
fn blocks_are_free_again_when_nobody_refers_to_them() {
    let pool = pool(5, None);
    let mut tables = BlockTables::new(&pool);
    append(&mut tables, &pool, 40, 64).unwrap();
    let used = pool.used_bytes();
    let fork = tables.clone();
    tables.truncate(16);
    assert_eq!(pool.used_bytes(), used);
    drop(fork);
    assert_eq!(pool.used_bytes(), used / 3);
    // Reserved, but not committed.
    let mut pass = Pass::default();
    tables.reserve(&pool, 30, (64, 64), &mut pass).unwrap();
    assert_eq!(pool.used_bytes(), used);
    tables.truncate(16);
    assert_eq!(pool.used_bytes(), used / 3);
    drop(tables);
    assert_eq!(pool.used_bytes(), 0);
    // Numbers are reused.
    let pass = append(&mut BlockTables::new(&pool), &pool, 40, 64).unwrap();
    assert!(pass.tables.iter().all(|&number| number < 3));
}

/// The copy of a shared block is only requested:
/// after a failed pass its positions no longer count.
#[test]
fn a_block_that_was_not_copied_is_not_taken_for_one_that_was() {
    let of_block = 16 * 3 * 2 * 2 * 2 * 4;
    let pool = pool(64, Some(3 * of_block));
    let mut tables = BlockTables::new(&pool);
    append(&mut tables, &pool, 20, 64).unwrap();
    let mut fork = tables.clone();
    // The copy takes the last block of the pool.
    let error = append(&mut fork, &pool, 20, 64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    fork.truncate(20);
    assert_eq!((fork.len(), tables.len()), (16, 20));
    let pass = append(&mut fork, &pool, 4, 64).unwrap();
    assert!(pass.copies.is_empty());
    fork.truncate(20);
    assert_eq!(fork.len(), 20);
}

#[test]
fn a_pool_without_blocks_refuses_and_loses_nothing() {
    let of_block = 16 * 3 * 2 * 2 * 2 * 4;
    let pool = pool(64, Some(2 * of_block));
    let mut tables = BlockTables::new(&pool);
    append(&mut tables, &pool, 20, 64).unwrap();
    let mut other = BlockTables::new(&pool);
    let error = append(&mut other, &pool, 1, 64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    other.truncate(0);
    append(&mut tables, &pool, 12, 64).unwrap();
    let error = append(&mut tables, &pool, 1, 64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    tables.truncate(32);
    assert_eq!((tables.len(), pool.used_bytes()), (32, 2 * of_block));
    // Beyond the context, independent of the pool.
    let error = append(&mut tables, &pool, 33, 64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}
