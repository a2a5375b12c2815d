#define LINESHAFT_VNNI
#define LINESHAFT_DOT_BF16
#define LINESHAFT_LANES "lanes_avx512.h"
#define LINESHAFT_PRODUCTS "tiled.h"
#define LINESHAFT_ATTEND "attend_direct.h"
#ifdef LINESHAFT_SOFT_TILES
#define LINESHAFT_TILES "tiles_soft.h"
#else
#define LINESHAFT_TILES "tiles.h"
#endif
#define LINESHAFT_TABLE kAmx
#define LINESHAFT_NAME "amx"
#include "table.inc"
