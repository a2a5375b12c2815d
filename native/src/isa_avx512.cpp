#define LINESHAFT_LANES "lanes_avx512.h"
#define LINESHAFT_TABLE kAvx512
#define LINESHAFT_NAME "avx512"
#include "table.inc"
