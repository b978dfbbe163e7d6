/* Makes the n-th allocation through mem_alloc, mem_strdup or file_map_open fail. The program links
 * with -Wl,--wrap for each of them (tests/models.cmake). */
#ifndef TMF_TESTS_ALLOC_FAIL_H
#define TMF_TESTS_ALLOC_FAIL_H

#include <stdbool.h>

void alloc_fail_at(long n); /* counted from 1; 0: never */
bool alloc_failed(void);    /* whether the last alloc_fail_at was reached */

#endif
