/* Where the fields of the structures lie, to be compared with what native/layout.py hands over. */

#include <stddef.h>

#include "pass.h"

typedef struct {
    const char *name;
    index_t offset, bytes;
} Field;

#define WHOLE(type) {#type, 0, sizeof(type)}
#define FIELD(type, name) {#type "." #name, offsetof(type, name), sizeof(((type *)0)->name)}

static const Field fields[] = {
    WHOLE(Sums),
    FIELD(Sums, start),
    FIELD(Sums, term),
    WHOLE(Map),
    FIELD(Map, data),
    FIELD(Map, batch),
    FIELD(Map, channel),
    FIELD(Map, position),
    FIELD(Map, positions),
    WHOLE(Epilogue),
    FIELD(Epilogue, scale),
    FIELD(Epilogue, bias),
    FIELD(Epilogue, mean),
    FIELD(Epilogue, variance),
    FIELD(Epilogue, weight),
    FIELD(Epilogue, shift),
    FIELD(Epilogue, added),
    FIELD(Epilogue, epsilon),
    FIELD(Epilogue, activation),
    FIELD(Epilogue, present),
    WHOLE(Pass),
    FIELD(Pass, batch),
    FIELD(Pass, rows),
    FIELD(Pass, cells),
    FIELD(Pass, groups),
    FIELD(Pass, cell_groups),
    FIELD(Pass, lanes),
    FIELD(Pass, depths),
    FIELD(Pass, lane_groups),
    FIELD(Pass, depth_groups),
    FIELD(Pass, row_tap),
    FIELD(Pass, row_group),
    FIELD(Pass, row_lane),
    FIELD(Pass, row_depth),
    FIELD(Pass, cell_step),
    FIELD(Pass, group_step),
    FIELD(Pass, lane_step),
    FIELD(Pass, depth_step),
    FIELD(Pass, out_positions),
    FIELD(Pass, source_positions),
    FIELD(Pass, out),
    FIELD(Pass, source),
    FIELD(Pass, other),
    FIELD(Pass, epilogue),
    FIELD(Pass, out_sums),
    FIELD(Pass, source_sums),
    FIELD(Pass, other_sums),
    FIELD(Pass, taps),
    FIELD(Pass, tiles),
    FIELD(Pass, spans),
    FIELD(Pass, tile_start),
    FIELD(Pass, tile),
    FIELD(Pass, reads),
    FIELD(Pass, span),
    FIELD(Pass, run),
    FIELD(Pass, block_depths),
    FIELD(Pass, mixed_samples),
    FIELD(Pass, read_samples),
    FIELD(Pass, parts),
    FIELD(Pass, threads),
    FIELD(Pass, ranks),
    FIELD(Pass, kept_filled),
    FIELD(Pass, base),
    FIELD(Pass, kept),
    FIELD(Pass, alpha),
    FIELD(Pass, cell),
    FIELD(Pass, alpha_gradient),
    FIELD(Pass, cell_gradient),
    FIELD(Pass, memory),
};

index_t kw_layout(const Field **found) {
    *found = fields;
    return sizeof(fields) / sizeof(fields[0]);
}
