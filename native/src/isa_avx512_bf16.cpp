#define LINESHAFT_VNNI
#define LINESHAFT_DOT_BF16
#define LINESHAFT_LANES "lanes_avx512.h"
#define LINESHAFT_TABLE kAvx512Bf16
#define LINESHAFT_NAME "avx512_bf16"
#include "table.inc"
