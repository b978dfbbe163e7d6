/* How a test's main ends: every case of a Check suite is run, the suite freed. */
#ifndef TMF_TESTS_SUITE_H
#define TMF_TESTS_SUITE_H

#include <check.h>

/* main's exit code; CK_VERBOSITY and CK_RUN_CASE are heeded. CK_NOFORK: what the cases share does
 * not survive a fork. */
static inline int suite_run_forked(Suite *s, enum fork_status how)
{
    SRunner *r = srunner_create(s);
    srunner_set_fork_status(r, how);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}

static inline int suite_run(Suite *s) { return suite_run_forked(s, CK_FORK_GETENV); }

#endif
