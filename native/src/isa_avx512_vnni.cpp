#define LINESHAFT_VNNI
#define LINESHAFT_LANES "lanes_avx512.h"
#define LINESHAFT_TABLE kAvx512Vnni
#define LINESHAFT_NAME "avx512_vnni"
#include "table.inc"
