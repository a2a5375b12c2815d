#define LINESHAFT_LANES "lanes_avx2.h"
#define LINESHAFT_TABLE kAvx2
#define LINESHAFT_NAME "avx2"
#include "table.inc"
